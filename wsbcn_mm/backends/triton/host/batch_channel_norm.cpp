// The operators of Batch-Channel Normalization for a GPU, as triton/launch.py: check, allocate,
// launch. Nothing waits for the device.
#include "batch_channel_norm.h"

#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>

#include "../../nodes/checks.h"
#include "operators.h"

namespace wsbcn::gpu {
namespace {

// Of a dense x; empty_like would find its strides anew.
Tensor like(const Tensor& x) {
  return at::empty_strided(x.sizes(), x.strides(), x.options());
}

void check_forward(const Tensor& x, const Running& running, const Affine& affine,
                   int64_t num_groups) {
  check_running(running, x);
  check_affine(affine, x, num_groups);
}

// A number, or a tensor on the device of x that the kernels read.
void set_rate(Stage1& stage_1, const Rate& rate, const Tensor& x) {
  if (!is_there(rate.tensor)) {
    stage_1.rate = rate.number.value_or(0);
    return;
  }
  const Tensor& tensor = *rate.tensor;
  TORCH_CHECK_VALUE(tensor.dim() == 0 && tensor.is_floating_point(),
                    "rate must be a number or a 0-d floating point tensor\n  got ",
                    tensor.scalar_type(), " of shape ", tensor.sizes());
  if (tensor.device() == x.device()) {
    stage_1.rate_tensor = tensor;
    return;
  }
  TORCH_CHECK_VALUE(tensor.is_cpu(), "rate must be on ", x.device(), " or the CPU\n  got ",
                    tensor.device());
  stage_1.rate = tensor.item<double>();  // on the host, where reading it waits for nothing
}

Flat normalize_from_x(const Tensor& input, int64_t num_groups, const Stage1& stage_1,
                      const Affine& affine, double eps) {
  const c10::DeviceGuard guard(input.device());
  const Tensor x = checked_input(input, num_groups);
  check_forward(x, *stage_1.running, affine, num_groups);
  const int64_t samples = x.size(0), channels = x.size(1);
  const std::array<int64_t, 2> rows{samples, channels}, groups{samples, num_groups};
  const auto cut = held(x, num_groups, limits().held);
  auto [small, scratch] =
      small_results(x, {rows, rows, channels, channels, groups, groups},
                    cut ? Sizes() : passes::forward_scratch(x));
  Tensor y = like(x);
  const Results results{y,
                        written(small[0]),
                        written(small[1]),
                        written(small[2]),
                        written(small[3]),
                        written(small[4]),
                        written(small[5])};
  if (cut) {
    at_once::normalize(x, results, stage_1, *cut, affine, eps);
  } else {
    const passes::Chunks chunks = passes::moments(x, results.m, results.q, scratch);
    passes::normalize(x, num_groups, results, stage_1, affine, eps, scratch, chunks);
  }
  return {std::move(y),        std::move(small[0]), std::move(small[1]), std::move(small[2]),
          std::move(small[3]), std::move(small[4]), std::move(small[5])};
}

}  // namespace

Affine dense(const Affine& affine) {
  const auto contiguous = [](const OptionalTensor& value) {
    return is_there(value) ? OptionalTensor(value->contiguous()) : std::nullopt;
  };
  return {contiguous(affine.batch_weight), contiguous(affine.batch_bias), contiguous(affine.weight),
          contiguous(affine.bias)};
}

int64_t stride_of(const Running* running, Tensor Running::* buffer) {
  return running == nullptr ? 0 : (running->*buffer).stride(0);
}

int64_t repeat(const OptionalTensor& affine, int64_t channels) {
  return is_there(affine) ? channels / affine->numel() : 1;
}

Pointer buffer(const Stage1& stage_1, Tensor Running::* buffer) {
  if (stage_1.running == nullptr) return {};
  const Tensor& tensor = stage_1.running->*buffer;
  return stage_1.needs_all_samples() ? written(tensor) : read(tensor);
}

Pointer counter(const Stage1& stage_1, OptionalTensor Running::* counter) {
  if (stage_1.running == nullptr || !is_there(stage_1.running->*counter)) return {};
  return written(*(stage_1.running->*counter));
}

std::tuple<Tensor, Tensor> row_moments(const Tensor& input) {
  const c10::DeviceGuard guard(input.device());
  const Tensor x = checked_input(input, 1);
  const std::array<int64_t, 2> rows{x.size(0), x.size(1)};
  auto small = small_results(x, {rows, rows});
  const Pointer m = written(small[0]), q = written(small[1]);
  const Scratch scratch(x, passes::forward_scratch(x));
  passes::merge(x, passes::moments(x, m, q, scratch), m, q);
  return {small[0], small[1]};
}

Flat normalize_with_estimates(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                              Tensor& running_var, const OptionalTensor& counts,
                              const OptionalTensor& num_batches_tracked,
                              const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              std::optional<double> rate, const OptionalTensor& rate_tensor,
                              double eps) {
  const Running running{running_mean, running_var, counts, num_batches_tracked};
  const Rate r{rate, rate_tensor};
  Stage1 stage_1{r.is_given() ? Source::estimate : Source::running, &running};
  set_rate(stage_1, r, x);
  return normalize_from_x(x, num_groups, stage_1, {batch_weight, batch_bias, weight, bias}, eps);
}

Flat normalize_with_batch(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                          Tensor& running_var, const OptionalTensor& counts,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          std::optional<double> rate, const OptionalTensor& rate_tensor,
                          double eps) {
  const Running running{running_mean, running_var, counts, num_batches_tracked};
  Stage1 stage_1{Source::batch, &running};
  set_rate(stage_1, {rate, rate_tensor}, x);
  return normalize_from_x(x, num_groups, stage_1, {batch_weight, batch_bias, weight, bias}, eps);
}

Tensor evaluate(const Tensor& input, int64_t num_groups, const Tensor& running_mean,
                const Tensor& running_var, const OptionalTensor& counts,
                const OptionalTensor& num_batches_tracked, const OptionalTensor& batch_weight,
                const OptionalTensor& batch_bias, const OptionalTensor& weight,
                const OptionalTensor& bias, double eps) {
  const c10::DeviceGuard guard(input.device());
  const Running running{running_mean, running_var, counts, num_batches_tracked};
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Stage1 stage_1{Source::running, &running};
  const Tensor x = checked_input(input, num_groups);
  const auto cut = held(x, num_groups, limits().held);
  if (!cut) return std::get<0>(normalize_from_x(x, num_groups, stage_1, affine, eps));
  check_forward(x, running, affine, num_groups);
  const Tensor y = like(x);
  const Scratch statistics(x, Sizes{x.size(1), x.size(1)});
  at_once::normalize(x, {y, {}, {}, statistics[0], statistics[1], {}, {}}, stage_1, *cut, affine,
                     eps);
  return y;
}

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, int64_t num_groups,
                                             const Tensor& m, const Tensor& q, const Tensor& mean,
                                             const Tensor& var, const OptionalTensor& batch_weight,
                                             const OptionalTensor& batch_bias,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps) {
  const c10::DeviceGuard guard(input.device());
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Tensor x = checked_input(input, num_groups);
  check_affine(affine, x, num_groups);
  const std::array<int64_t, 2> groups{x.size(0), num_groups};
  auto small = small_results(x, {groups, groups});
  const Statistics s{m.contiguous(),   q.contiguous(), mean.contiguous(),
                     var.contiguous(), small[0],       small[1]};
  check_statistics(s, x, num_groups);
  const Tensor y = like(x);
  const Results results{y,
                        read(s.m),
                        read(s.q),
                        read(s.mean),
                        read(s.var),
                        written(s.group_mean),
                        written(s.inv_group_std)};
  const auto cut = held(x, num_groups, limits().held);
  if (cut) {
    at_once::normalize(x, results, {Source::given}, *cut, affine, eps);
  } else {
    const Scratch scratch(x, passes::forward_scratch(x));
    passes::normalize(x, num_groups, results, {Source::given}, affine, eps, scratch, {});
  }
  return {y, s.group_mean, s.inv_group_std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& input, int64_t num_groups, const Tensor& m, const Tensor& q,
    const Tensor& mean, const Tensor& var, const Tensor& group_mean, const Tensor& inv_group_std,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool through_statistics) {
  const c10::DeviceGuard guard(input.device());
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Statistics s{m.contiguous(),   q.contiguous(),          mean.contiguous(),
                     var.contiguous(), group_mean.contiguous(), inv_group_std.contiguous()};
  const Tensor x = checked_input(input, num_groups);
  check_gradient(grad, x);
  check_statistics(s, x, num_groups);
  check_affine(affine, x, num_groups);
  // Whatever layout comes: compiled code brings others than it was traced with.
  const Tensor g = grad.contiguous(layout_of(x));
  const int64_t channels = x.size(1), outer = affine.outer_size();
  const auto cut = held(x, num_groups, limits().held_backward);
  const auto [small, scratch] =
      small_results(x, {channels, channels, outer, outer},
                    cut ? Sizes() : passes::backward_scratch(x, num_groups));
  const Gradients gradients{like(x), small[0], small[1], small[2], small[3]};
  const BackwardCall call{g, x, num_groups, s, affine, eps, through_statistics};
  if (cut) {
    at_once::gradients_of(call, *cut, gradients);
  } else {
    passes::gradients_of(call, gradients, scratch);
  }
  return {gradients.dx, small[0], small[1], small[2], small[3]};
}

}  // namespace wsbcn::gpu
