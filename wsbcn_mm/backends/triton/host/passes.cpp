// As triton/passes.py.
#include "../../nodes/checks.h"
#include "batch_channel_norm.h"

namespace wsbcn::gpu::passes {
namespace {

// Of what a reducing pass leaves to be merged, values of each kind; 0: it writes whole rows.
int64_t chunks_of(const Tensor& x, const Cut& cut) {
  return cut.splits == 1 ? 0 : x.size(0) * x.size(1) * cut.splits;
}

}  // namespace

Chunks moments(const Tensor& x, Pointer m, Pointer q) {
  const Cut c = cut(x, limits().reducing);
  const int64_t size = chunks_of(x, c), rows = x.size(0) * x.size(1);
  Chunks chunks{c, std::nullopt};
  if (size > 0) chunks.parts.emplace(x, std::initializer_list<int64_t>{size, size, rows, rows});
  start("moments", c.grid, x.device(),
        {{read(x), chunks.parts ? chunks.first() : m, chunks.parts ? chunks.second() : q},
         {x.size(1), c.length, c.tiles},
         c.constants()});
  return chunks;
}

void merge(const Chunks& chunks, Pointer m, Pointer q, int64_t samples, int64_t channels,
           c10::Device device) {
  const Cut& c = chunks.cut;
  const int64_t rows = samples * channels;
  const MergeBlocks blocks = merge_blocks(rows, c.splits);
  start("merge_moments", {divided_up(rows, blocks.block_r)}, device,
        {{chunks.first(), chunks.second(), m, q},
         {samples, channels, c.length, c.tiles, c.splits},
         {{"BLOCK_L", c.layout.block_l},
          {"BLOCK_R", blocks.block_r},
          {"BLOCK_K", blocks.block_k},
          {"num_warps", warps(limits().tile)}}});
}

void normalize(const Tensor& x, int64_t num_groups, const Results& results, const Stage1& stage_1,
               const Affine& affine, double eps, const Chunks* chunks) {
  const int64_t samples = x.size(0), channels = x.size(1), rows = samples * channels;
  const Affine a = dense(affine);
  std::optional<Scratch> own;
  if (!chunks || !chunks->parts) own.emplace(x, std::initializer_list<int64_t>{rows, rows});
  const Pointer scale = own ? (*own)[0] : (*chunks->parts)[2];
  const Pointer shift = own ? (*own)[1] : (*chunks->parts)[3];
  const Cut reducing = cut(x, limits().reducing);
  const AlgebraBlocks blocks = algebra_blocks(samples, channels / num_groups, reducing.splits);
  // An update needs all samples of a group in one program; otherwise there may be many.
  const int64_t shares = stage_1.needs_all_samples() ? 1 : divided_up(samples, blocks.block_n);
  start("forward_algebra", {num_groups, shares}, x.device(),
        {{chunks ? chunks->first() : Pointer(), chunks ? chunks->second() : Pointer(), results.m,
          results.q, buffer(stage_1, &Running::mean), buffer(stage_1, &Running::var),
          read(stage_1.rate_tensor), counter(stage_1, &Running::counts),
          counter(stage_1, &Running::num_batches_tracked), results.mean, results.var,
          read(a.batch_weight), read(a.batch_bias), read(a.weight), read(a.bias),
          results.group_mean, results.inv_group_std, scale, shift},
         {samples, channels, num_groups, reducing.length, reducing.tiles, reducing.splits,
          stride_of(stage_1.running, &Running::mean), stride_of(stage_1.running, &Running::var),
          bits(stage_1.rate), bits(eps)},
         {{"STATISTICS", static_cast<int64_t>(stage_1.source)},
          {"WEIGHT_REPEAT", repeat(a.weight, channels)},
          {"BIAS_REPEAT", repeat(a.bias, channels)},
          {"BLOCK_L", reducing.layout.block_l},
          {"BLOCK_R", blocks.block_r},
          {"BLOCK_K", blocks.block_k},
          {"BLOCK_N", blocks.block_n},
          {"BLOCK_C", blocks.block_c},
          {"num_warps", blocks.num_warps}}});
  const Cut applying = cut(x, limits().applying);
  start("forward_apply", applying.grid, x.device(),
        {{read(x), written(results.y), results.m, scale, shift},
         {channels, applying.length, applying.tiles},
         applying.constants()});
}

void gradients_of(const BackwardCall& call, const Gradients& gradients) {
  const Tensor& x = call.x;
  const Statistics& s = call.statistics;
  const int64_t samples = x.size(0), channels = x.size(1), rows = samples * channels;
  const int64_t groups = samples * call.num_groups;
  const Affine a = dense(call.affine);
  const Cut reducing = cut(x, limits().reducing);
  const int64_t size = chunks_of(x, reducing);
  const Scratch scratch(x, {rows, rows, groups, groups, rows, rows, rows, size, size});
  const Pointer sum_g = scratch[0], sum_gx = scratch[1];
  const Pointer first = size > 0 ? scratch[7] : Pointer();
  const Pointer second = size > 0 ? scratch[8] : Pointer();
  start("backward_sums", reducing.grid, x.device(),
        {{read(call.grad), read(x), read(s.m), size > 0 ? first : sum_g, size > 0 ? second : sum_gx},
         {channels, reducing.length, reducing.tiles},
         reducing.constants()});
  const AlgebraBlocks blocks = algebra_blocks(samples, channels / call.num_groups, reducing.splits);
  start("backward_algebra", {call.num_groups}, x.device(),
        {{first,
          second,
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
         {samples, channels, call.num_groups, reducing.length, reducing.splits,
          bits(call.eps)},
         {{"WEIGHT_REPEAT", repeat(a.weight, channels)},
          {"PER_CHANNEL", gradients.weight.numel() == channels},
          {"THROUGH_STATISTICS", call.through_statistics},
          {"BLOCK_R", blocks.block_r},
          {"BLOCK_K", blocks.block_k},
          {"BLOCK_N", blocks.block_n},
          {"BLOCK_C", blocks.block_c},
          {"num_warps", blocks.num_warps}}});
  const Cut applying = cut(x, limits().applying);
  start("backward_apply", applying.grid, x.device(),
        {{read(call.grad), read(x), written(gradients.dx), read(s.m), scratch[4], scratch[5],
          scratch[6]},
         {channels, applying.length, applying.tiles},
         applying.constants()});
}

}  // namespace wsbcn::gpu::passes
