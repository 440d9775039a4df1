// As triton/passes.py.
#include <algorithm>

#include "../../nodes/checks.h"
#include "batch_channel_norm.h"

namespace wsbcn::gpu::passes {
namespace {

// Programs in y of a grid, which CUDA allows.
constexpr int64_t kMostInY = 65535;

// Of what a reducing pass leaves to be merged, values of each kind; 0: it writes whole rows.
int64_t chunks_of(const Tensor& x, const Cut& cut) {
  return cut.splits == 1 ? 0 : x.size(0) * x.size(1) * cut.splits;
}

}  // namespace

// The chunks of both moments, the two coefficients of each row.
Sizes forward_scratch(const Tensor& x) {
  const int64_t rows = x.size(0) * x.size(1), size = chunks_of(x, reducing(x));
  return {size, size, rows, rows};
}

// The sums of each row, of each group, the coefficients of each row, the chunks of the sums.
Sizes backward_scratch(const Tensor& x, int64_t num_groups) {
  const int64_t rows = x.size(0) * x.size(1), groups = x.size(0) * num_groups;
  const int64_t size = chunks_of(x, reducing(x));
  return {rows, rows, groups, groups, rows, rows, rows, size, size};
}

Chunks moments(const Tensor& x, Pointer m, Pointer q, const Scratch& scratch) {
  const Cut c = reducing(x);
  Chunks chunks;
  if (c.splits > 1) chunks = {scratch[0], scratch[1]};
  start("moments", c.grid, x.device(),
        {{read(x), c.splits > 1 ? chunks.first : m, c.splits > 1 ? chunks.second : q},
         {x.size(1), c.length, c.tiles},
         c.constants()});
  return chunks;
}

void merge(const Tensor& x, const Chunks& chunks, Pointer m, Pointer q) {
  const Cut c = reducing(x);
  if (c.splits == 1) return;
  const int64_t samples = x.size(0), channels = x.size(1), rows = samples * channels;
  const MergeBlocks blocks = merge_blocks(rows, c.splits);
  start("merge_moments", {divided_up(rows, blocks.block_r)}, x.device(),
        {{chunks.first, chunks.second, m, q},
         {samples, channels, c.length, c.tiles, c.splits},
         {{"BLOCK_L", c.layout.block_l},
          {"BLOCK_R", blocks.block_r},
          {"BLOCK_K", blocks.block_k},
          {"num_warps", warps(limits().tile)}}});
}

void normalize(const Tensor& x, int64_t num_groups, const Results& results, const Stage1& stage_1,
               const Affine& affine, double eps, const Scratch& scratch, const Chunks& chunks) {
  const int64_t samples = x.size(0), channels = x.size(1);
  const Affine a = dense(affine);
  const Pointer scale = scratch[2], shift = scratch[3];
  const Cut first = reducing(x);
  const AlgebraBlocks blocks = algebra_blocks(samples, channels / num_groups, first.splits);
  // An update needs all samples of a group in one program; otherwise there may be many.
  const int64_t shares =
      stage_1.needs_all_samples() ? 1 : std::min(divided_up(samples, blocks.block_n), kMostInY);
  start("forward_algebra", {num_groups, shares}, x.device(),
        {{chunks.first, chunks.second, results.m, results.q, buffer(stage_1, &Running::mean),
          buffer(stage_1, &Running::var),
          read(stage_1.rate_tensor), counter(stage_1, &Running::counts),
          counter(stage_1, &Running::num_batches_tracked), results.mean, results.var,
          read(a.batch_weight), read(a.batch_bias), read(a.weight), read(a.bias),
          results.group_mean, results.inv_group_std, scale, shift},
         {samples, channels, num_groups, first.length, first.tiles, first.splits,
          stride_of(stage_1.running, &Running::mean), stride_of(stage_1.running, &Running::var),
          bits(stage_1.rate), bits(eps)},
         {{"STATISTICS", static_cast<int64_t>(stage_1.source)},
          {"WEIGHT_REPEAT", repeat(a.weight, channels)},
          {"BIAS_REPEAT", repeat(a.bias, channels)},
          {"BLOCK_L", first.layout.block_l},
          {"BLOCK_R", blocks.block_r},
          {"BLOCK_K", blocks.block_k},
          {"BLOCK_N", blocks.block_n},
          {"BLOCK_C", blocks.block_c},
          {"num_warps", blocks.num_warps}}});
  const Cut last = applying(x);
  start("forward_apply", last.grid, x.device(),
        {{read(x), written(results.y), results.m, scale, shift},
         {channels, last.length, last.tiles},
         last.constants()});
}

void gradients_of(const BackwardCall& call, const Gradients& gradients, const Scratch& scratch) {
  const Tensor& x = call.x;
  const Statistics& s = call.statistics;
  const int64_t samples = x.size(0), channels = x.size(1);
  const Affine a = dense(call.affine);
  const Cut first = reducing(x);
  const int64_t size = chunks_of(x, first);
  const Pointer sum_g = scratch[0], sum_gx = scratch[1];
  const Pointer parts_g = size > 0 ? scratch[7] : Pointer();
  const Pointer parts_gx = size > 0 ? scratch[8] : Pointer();
  start("backward_sums", first.grid, x.device(),
        {{read(call.grad), read(x), read(s.m), size > 0 ? parts_g : sum_g,
         size > 0 ? parts_gx : sum_gx},
         {channels, first.length, first.tiles},
         first.constants()});
  const AlgebraBlocks blocks = algebra_blocks(samples, channels / call.num_groups, first.splits);
  start("backward_algebra", {call.num_groups}, x.device(),
        {{parts_g,
          parts_gx,
          sum_g,
          sum_gx,
          read(s.m),
          read(s.q),
          read(s.mean),
          read(s.var),
          read(s.group_mean),
          read(s.inv_group_std),
          read(a.batch_weight),
          read(a.batch_bias),
          read(a.weight),
          scratch[2],
          scratch[3],
          written(gradients.batch_weight),
          written(gradients.batch_bias),
          written(gradients.weight),
          written(gradients.bias),
          scratch[4],
          scratch[5],
          scratch[6]},
         {samples, channels, call.num_groups, first.length, first.splits,
          bits(call.eps)},
         {{"WEIGHT_REPEAT", repeat(a.weight, channels)},
          {"PER_CHANNEL", gradients.weight.numel() == channels},
          {"THROUGH_STATISTICS", call.through_statistics},
          {"BLOCK_R", blocks.block_r},
          {"BLOCK_K", blocks.block_k},
          {"BLOCK_N", blocks.block_n},
          {"BLOCK_C", blocks.block_c},
          {"num_warps", blocks.num_warps}}});
  const Cut last = applying(x);
  start("backward_apply", last.grid, x.device(),
        {{read(call.grad), read(x), written(gradients.dx), read(s.m), scratch[4], scratch[5],
          scratch[6]},
         {channels, last.length, last.tiles},
         last.constants()});
}

}  // namespace wsbcn::gpu::passes
