// As triton/at_once.py.
#include "batch_channel_norm.h"

namespace wsbcn::gpu::at_once {
void normalize(const Tensor& x, const Results& results, const Stage1& stage_1, const Held& cut,
               const Affine& affine, double eps) {
  const int64_t samples = x.size(0), channels = x.size(1);
  const Affine a = dense(affine);
  start("forward_held", {cut.num_groups}, x.device(),
        {{read(x), written(results.y), results.m, results.q, buffer(stage_1, &Running::mean),
          buffer(stage_1, &Running::var), read(stage_1.rate_tensor),
          counter(stage_1, &Running::counts), counter(stage_1, &Running::num_batches_tracked),
          results.mean, results.var, read(a.batch_weight), read(a.batch_bias), read(a.weight),
          read(a.bias), results.group_mean, results.inv_group_std},
         {samples, channels, cut.num_groups, cut.length, stride_of(stage_1.running, &Running::mean),
          stride_of(stage_1.running, &Running::var), bits(stage_1.rate), bits(eps)},
         {{"STATISTICS", static_cast<int64_t>(stage_1.source)},
          {"WEIGHT_REPEAT", repeat(a.weight, channels)},
          {"BIAS_REPEAT", repeat(a.bias, channels)},
          {"AXIS", cut.layout.axis},
          {"VECTOR", cut.layout.vector},
          {"BLOCK_N", block(samples, limits().tile / cut.layout.block_c)},
          {"BLOCK_C", cut.layout.block_c},
          {"BLOCK_L", cut.layout.block_l},
          {"num_warps", cut.layout.num_warps}}});
}

void gradients_of(const BackwardCall& call, const Held& cut, const Gradients& gradients) {
  const Tensor& x = call.x;
  const Statistics& s = call.statistics;
  const int64_t samples = x.size(0), channels = x.size(1);
  const Affine a = dense(call.affine);
  std::optional<Scratch> mean_h;
  if (call.through_statistics) {
    mean_h.emplace(x, Sizes{2 * samples * cut.num_groups});
  }
  start(
      "backward_held", {cut.num_groups}, x.device(),
      {{read(call.grad), read(x), written(gradients.dx), read(s.m), read(s.q), read(s.mean),
        read(s.var), read(s.group_mean), read(s.inv_group_std), read(a.batch_weight),
        read(a.batch_bias), read(a.weight), mean_h ? (*mean_h)[0] : Pointer(),
        written(gradients.batch_weight),
        written(gradients.batch_bias), written(gradients.weight), written(gradients.bias)},
       {samples, channels, cut.num_groups, cut.length, bits(call.eps)},
       {{"WEIGHT_REPEAT", repeat(a.weight, channels)},
        {"PER_CHANNEL", gradients.weight.numel() == channels},
        {"THROUGH_STATISTICS", call.through_statistics},
        {"AXIS", cut.layout.axis},
        {"VECTOR", cut.layout.vector},
        {"BLOCK_C", cut.layout.block_c},
        {"BLOCK_L", cut.layout.block_l},
        {"num_warps", cut.layout.num_warps}}});
}

}  // namespace wsbcn::gpu::at_once
