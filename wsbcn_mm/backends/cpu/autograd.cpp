// Batch-Channel Normalization with its gradients, as a node of torch's graph: what
// backends/autograd.py does for every backend, without Python in between, which takes longer than a
// small map. The second derivative goes back there (`normalize_twice`).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

namespace wsbcn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

// An operator of backends/ops.py; the signature is checked when it is first used.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

at::MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

Tensor or_undefined(const OptionalTensor& tensor) { return tensor.value_or(Tensor()); }

// In the dtype of its parameter; per channel where the parameter is per group: summed.
Tensor gradient_of(const Tensor& parameter, Tensor gradient) {
  if (!parameter.defined()) return Tensor();
  if (gradient.numel() != parameter.numel()) {
    gradient = gradient.view({parameter.numel(), -1}).sum(1);
  }
  return gradient.to(parameter.scalar_type());
}

int64_t count_of(const Tensor& parameter) { return parameter.defined() ? parameter.numel() : 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_with_estimates(
    const Tensor& x, int64_t num_groups, Tensor& running_mean, Tensor& running_var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, bool update, double momentum,
    const OptionalTensor& rate, double eps, const OptionalTensor& counts) {
  static const auto op = find<decltype(normalize_with_estimates)>(
      "wsbcn_mm::normalize_with_estimates");
  auto result = op.call(x, num_groups, running_mean, running_var, batch_weight, batch_bias, weight,
                        bias, update, momentum, rate, eps, counts);
  // A kernel writes through pointers: torch must know that the buffers have changed.
  if (update && !running_mean.is_inference()) running_mean.unsafeGetTensorImpl()->bump_version();
  if (update && !running_var.is_inference()) running_var.unsafeGetTensorImpl()->bump_version();
  return result;
}

Tensor evaluate(
    const Tensor& x, int64_t num_groups, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  static const auto op = find<decltype(evaluate)>("wsbcn_mm::evaluate");
  return op.call(x, num_groups, running_mean, running_var, batch_weight, batch_bias, weight, bias,
                 eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, const Tensor& m, const Tensor& q, const Tensor& mean,
    const Tensor& var, const Tensor& group_mean, const Tensor& inv_group_std,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, int64_t num_groups, int64_t affine_size, double eps,
    bool through_statistics) {
  static const auto op = find<decltype(normalize_backward)>("wsbcn_mm::normalize_backward");
  return op.call(grad, x, m, q, mean, var, group_mean, inv_group_std, batch_weight, batch_bias,
                 weight, num_groups, affine_size, eps, through_statistics);
}

std::vector<Tensor> normalize_twice(
    const Tensor& grad, const Tensor& x, const OptionalTensor& batch_weight,
    const OptionalTensor& batch_bias, const OptionalTensor& weight, const OptionalTensor& bias,
    const Tensor& mean, const Tensor& var, int64_t num_groups, double eps) {
  static const auto op = find<decltype(normalize_twice)>("wsbcn_mm::normalize_twice");
  return op.call(grad, x, batch_weight, batch_bias, weight, bias, mean, var, num_groups, eps);
}

struct Normalize : torch::autograd::Function<Normalize> {
  static Tensor forward(
      AutogradContext* ctx, const Tensor& x, const OptionalTensor& batch_weight,
      const OptionalTensor& batch_bias, const OptionalTensor& weight, const OptionalTensor& bias,
      Tensor running_mean, Tensor running_var, int64_t num_groups, bool update, double momentum,
      const OptionalTensor& rate, double eps, const OptionalTensor& counts) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, m, q, mean, var, group_mean, inv_group_std] = normalize_with_estimates(
        x, num_groups, running_mean, running_var, batch_weight, batch_bias, weight, bias, update,
        momentum, rate, eps, counts);
    ctx->save_for_backward({x, or_undefined(batch_weight), or_undefined(batch_bias),
                            or_undefined(weight), or_undefined(bias), m, q, mean, var, group_mean,
                            inv_group_std});
    ctx->saved_data["groups"] = num_groups;
    ctx->saved_data["eps"] = eps;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &x = saved[0], &batch_weight = saved[1], &batch_bias = saved[2];
    const Tensor &weight = saved[3], &bias = saved[4];
    const int64_t num_groups = ctx->saved_data["groups"].toInt();
    const double eps = ctx->saved_data["eps"].toDouble();
    variable_list result(13);
    if (at::GradMode::is_enabled()) {
      auto found = normalize_twice(
          grads[0], x, optional(batch_weight), optional(batch_bias), optional(weight),
          optional(bias), saved[7], saved[8], num_groups, eps);
      for (size_t i = 0, next = 0; i < 5; ++i) {
        if (saved[i].defined() && saved[i].requires_grad()) result[i] = found[next++];
      }
      return result;
    }
    const int64_t affine_size = std::max(count_of(weight), count_of(bias));
    auto [dx, d_batch_weight, d_batch_bias, d_weight, d_bias] = normalize_backward(
        grads[0].contiguous(layout_of(x)), x, saved[5], saved[6], saved[7], saved[8], saved[9],
        saved[10], optional(batch_weight), optional(batch_bias), optional(weight), num_groups,
        affine_size, eps, false);
    result[0] = dx;
    result[1] = gradient_of(batch_weight, d_batch_weight);
    result[2] = gradient_of(batch_bias, d_batch_bias);
    result[3] = gradient_of(weight, d_weight);
    result[4] = gradient_of(bias, d_bias);
    return result;
  }
};

bool wanted(const OptionalTensor& tensor) { return tensor.has_value() && tensor->requires_grad(); }

// x dense and not empty.
Tensor batch_channel_norm(
    const Tensor& x, const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, Tensor& running_mean,
    Tensor& running_var, int64_t num_groups, bool update, double momentum,
    const OptionalTensor& rate, double eps, const OptionalTensor& counts) {
  const bool differentiable = at::GradMode::is_enabled() &&
      (x.requires_grad() || wanted(batch_weight) || wanted(batch_bias) || wanted(weight) ||
       wanted(bias));
  if (differentiable) {
    return Normalize::apply(x, batch_weight, batch_bias, weight, bias, running_mean, running_var,
                            num_groups, update, momentum, rate, eps, counts);
  }
  at::AutoDispatchBelowADInplaceOrView below;
  if (!update) {
    return evaluate(x, num_groups, running_mean, running_var, batch_weight, batch_bias, weight,
                    bias, eps);
  }
  return std::get<0>(normalize_with_estimates(
      x, num_groups, running_mean, running_var, batch_weight, batch_bias, weight, bias, update,
      momentum, rate, eps, counts));
}

// Above autograd and, for inference tensors, without it.
TORCH_LIBRARY_IMPL(wsbcn_mm, AutogradCPU, library) {
  library.impl("batch_channel_norm", batch_channel_norm);
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CPU, library) {
  library.impl("batch_channel_norm", batch_channel_norm);
}

}  // namespace
}  // namespace wsbcn
