// As triton/at_once.py.
#include "batch_channel_norm.h"

namespace wsbcn::gpu::at_once {
namespace {

int64_t tile_of(const Held& cut) {
  return limits().tile / cut.layout.block_c;
}

}  // namespace

void update_statistics(const Tensor& x, const Results& results, const Stage1& stage_1,
                       const Held& cut) {
  const int64_t samples = x.size(0), channels = x.size(1);
  const AlgebraBlocks blocks = algebra_blocks(samples, channels / cut.num_groups, 1);
  start("update_statistics", {cut.num_groups}, x.device(),
        {{results.m, results.q, buffer(stage_1, &Running::mean), buffer(stage_1, &Running::var),
          read(stage_1.rate_tensor), counter(stage_1, &Running::counts),
          counter(stage_1, &Running::num_batches_tracked), results.mean, results.var},
         {samples, channels, cut.num_groups, cut.length, stride_of(stage_1.running, &Running::mean),
          stride_of(stage_1.running, &Running::var), bits(stage_1.rate)},
         {{"STATISTICS", static_cast<int64_t>(stage_1.source)},
          {"BLOCK_N", blocks.block_n},
          {"BLOCK_C", blocks.block_c},
          {"num_warps", warps(2 * blocks.block_n * blocks.block_c)}}});
}

void normalize(const Tensor& x, const Results& results, const Stage1& stage_1, const Held& cut,
               const Affine& affine, double eps) {
  const int64_t samples = x.size(0), channels = x.size(1);
  const Affine a = dense(affine);
  start("forward_held", {cut.num_groups, stage_1.needs_all_samples() ? 1 : cut.shares}, x.device(),
        {{read(x), written(results.y), results.m, results.q, buffer(stage_1, &Running::mean),
          buffer(stage_1, &Running::var), read(stage_1.rate_tensor),
          counter(stage_1, &Running::counts), counter(stage_1, &Running::num_batches_tracked),
          results.mean, results.var, read(a.batch_weight), read(a.batch_bias), read(a.weight),
          read(a.bias), results.group_mean, results.inv_group_std},
         {samples, channels, cut.num_groups, cut.length, stride_of(stage_1.running, &Running::mean),
          stride_of(stage_1.running, &Running::var), repeat(a.weight, channels),
          repeat(a.bias, channels), bits(stage_1.rate), bits(eps)},
         {{"STATISTICS", static_cast<int64_t>(stage_1.source)},
          {"AXIS", cut.layout.axis},
          {"VECTOR", cut.layout.vector},
          {"BLOCK_N", block(samples, tile_of(cut))},
          {"BLOCK_C", cut.layout.block_c},
          {"BLOCK_L", cut.layout.block_l},
          {"num_warps", cut.layout.num_warps}}});
}

void gradients_of(const BackwardCall& call, const Held& cut, const Gradients& gradients) {
  const Tensor& x = call.x;
  const Statistics& s = call.statistics;
  const int64_t samples = x.size(0), channels = x.size(1);
  const int64_t shares = cut.at_once ? 1 : cut.shares;
  const Affine a = dense(call.affine);
  std::optional<Scratch> parts, mean_h;
  if (shares > 1) parts.emplace(x, std::initializer_list<int64_t>{4 * shares * channels});
  if (call.through_statistics) {
    mean_h.emplace(x, std::initializer_list<int64_t>{2 * samples * cut.num_groups});
  }
  const Constant per_channel{"PER_CHANNEL", gradients.weight.numel() == channels};
  start(
      "backward_held", {cut.num_groups, shares}, x.device(),
      {{read(call.grad), read(x), written(gradients.dx), read(s.m), read(s.q), read(s.mean),
        read(s.var), read(s.group_mean), read(s.inv_group_std), read(a.batch_weight),
        read(a.batch_bias), read(a.weight), parts ? (*parts)[0] : Pointer(),
        mean_h ? (*mean_h)[0] : Pointer(), written(gradients.batch_weight),
        written(gradients.batch_bias), written(gradients.weight), written(gradients.bias)},
       {samples, channels, cut.num_groups, cut.length, repeat(a.weight, channels), bits(call.eps)},
       {per_channel,
        {"THROUGH_STATISTICS", call.through_statistics},
        {"AXIS", cut.layout.axis},
        {"VECTOR", cut.layout.vector},
        {"BLOCK_C", cut.layout.block_c},
        {"BLOCK_L", cut.layout.block_l},
        {"num_warps", cut.layout.num_warps}}});
  if (!parts) return;
  const int64_t block_c = cut.layout.block_c, block_k = block(shares, tile_of(cut));
  start("merge_shares", {cut.num_groups}, x.device(),
        {{(*parts)[0], read(s.var), written(gradients.batch_weight), written(gradients.batch_bias),
          written(gradients.weight), written(gradients.bias)},
         {shares, channels, cut.num_groups, bits(call.eps)},
         {per_channel,
          {"BLOCK_K", block_k},
          {"BLOCK_C", block_c},
          {"num_warps", warps(block_k * block_c)}}});
}

}  // namespace wsbcn::gpu::at_once
