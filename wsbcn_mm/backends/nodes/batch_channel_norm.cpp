// Batch-Channel Normalization with its gradients, as a node of torch's graph: what
// backends/autograd.py does for every backend, without Python in between, which takes longer than a
// small map. The second derivative goes back there (`normalize_twice`).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <vector>

#include "batch_channel_norm.h"

namespace wsbcn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// An operator of backends/ops.py; the signature is checked when it is first used.
template <typename Signature>
c10::TypedOperatorHandle<Signature> operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

Tensor or_undefined(const OptionalTensor& tensor) {
  return tensor.value_or(Tensor());
}

// In the dtype of its parameter; per channel where the parameter is per group: summed.
Tensor gradient_of(const OptionalTensor& parameter, Tensor gradient) {
  if (!is_there(parameter)) return Tensor();
  if (gradient.numel() != parameter->numel()) {
    gradient = gradient.view({parameter->numel(), -1}).sum(1);
  }
  return gradient.to(parameter->scalar_type());
}

// What a call computes with, beside x and the affine.
struct Call {
  int64_t num_groups;
  Running running;
  Rate rate;
  double eps;
  bool from_batch;
};

// Both operators have one signature.
std::tuple<Tensor, Statistics> normalize_with_statistics(const Tensor& x, const Affine& affine,
                                                         const Call& call) {
  using Signature = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, int64_t, Tensor&, Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      std::optional<double>, const OptionalTensor&, double);
  static const auto estimates = operator_of<Signature>("wsbcn_mm::normalize_with_estimates");
  static const auto batch = operator_of<Signature>("wsbcn_mm::normalize_with_batch");
  Tensor running_mean = call.running.mean, running_var = call.running.var;
  auto [y, m, q, mean, var, group_mean, inv_group_std] =
      (call.from_batch ? batch : estimates)
          .call(x, call.num_groups, running_mean, running_var, call.running.counts,
                call.running.num_batches_tracked, affine.batch_weight, affine.batch_bias,
                affine.weight, affine.bias, call.rate.number, call.rate.tensor, call.eps);
  // A kernel writes through pointers: torch must know that the buffers have changed.
  if (call.rate.is_given()) {
    for (const Tensor& buffer :
         {running_mean, running_var, or_undefined(call.running.num_batches_tracked)}) {
      if (buffer.defined() && !buffer.is_inference()) {
        buffer.unsafeGetTensorImpl()->bump_version();
      }
    }
  }
  return {y, {m, q, mean, var, group_mean, inv_group_std}};
}

Tensor evaluate(const Tensor& x, const Affine& affine, const Call& call) {
  static const auto op = operator_of<Tensor(
      const Tensor&, int64_t, const Tensor&, const Tensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, double)>("wsbcn_mm::evaluate");
  return op.call(x, call.num_groups, call.running.mean, call.running.var, call.running.counts,
                 call.running.num_batches_tracked, affine.batch_weight, affine.batch_bias,
                 affine.weight, affine.bias, call.eps);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, const Statistics& s,
    const Affine& affine, double eps, bool through_statistics) {
  static const auto op = operator_of<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
      const Tensor&, const Tensor&, int64_t, const Tensor&, const Tensor&, const Tensor&,
      const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, double, bool)>("wsbcn_mm::normalize_backward");
  return op.call(grad, x, num_groups, s.m, s.q, s.mean, s.var, s.group_mean, s.inv_group_std,
                 affine.batch_weight, affine.batch_bias, affine.weight, affine.bias, eps,
                 through_statistics);
}

// Without mean and var: those of x.
std::vector<Tensor> normalize_twice(const Tensor& grad, const Tensor& x, int64_t num_groups,
                                    const OptionalTensor& mean, const OptionalTensor& var,
                                    const Affine& affine, double eps) {
  static const auto op = operator_of<std::vector<Tensor>(
      const Tensor&, const Tensor&, int64_t, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      double)>("wsbcn_mm::normalize_twice");
  return op.call(grad, x, num_groups, mean, var, affine.batch_weight, affine.batch_bias,
                 affine.weight, affine.bias, eps);
}

struct Normalize : torch::autograd::Function<Normalize> {
  // The tensors that are differentiated first, one by one: torch looks for them there.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const OptionalTensor& batch_weight,
                        const OptionalTensor& batch_bias, const OptionalTensor& weight,
                        const OptionalTensor& bias, const Call& call) {
    at::AutoDispatchBelowADInplaceOrView below;
    auto [y, s] = normalize_with_statistics(x, {batch_weight, batch_bias, weight, bias}, call);
    ctx->save_for_backward({x, or_undefined(batch_weight), or_undefined(batch_bias),
                            or_undefined(weight), or_undefined(bias), s.m, s.q, s.mean, s.var,
                            s.group_mean, s.inv_group_std});
    ctx->saved_data["num_groups"] = call.num_groups;
    ctx->saved_data["eps"] = call.eps;
    ctx->saved_data["from_batch"] = call.from_batch;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const Affine affine{optional(saved[1]), optional(saved[2]), optional(saved[3]),
                        optional(saved[4])};
    const Statistics s{saved[5], saved[6], saved[7], saved[8], saved[9], saved[10]};
    const int64_t num_groups = ctx->saved_data["num_groups"].toInt();
    const double eps = ctx->saved_data["eps"].toDouble();
    const bool from_batch = ctx->saved_data["from_batch"].toBool();
    variable_list result(6);
    if (is_differentiated(grads[0])) {
      const OptionalTensor none;
      auto gradients = normalize_twice(grads[0], x, num_groups, from_batch ? none : s.mean,
                                       from_batch ? none : s.var, affine, eps);
      for (size_t i = 0, next = 0; i < 5; ++i) {
        if (saved[i].defined() && saved[i].requires_grad()) result[i] = gradients[next++];
      }
      return result;
    }
    auto [dx, d_batch_weight, d_batch_bias, d_weight, d_bias] =
        normalize_backward(grads[0], x, num_groups, s, affine, eps, from_batch);
    result[0] = dx;
    result[1] = gradient_of(affine.batch_weight, d_batch_weight);
    result[2] = gradient_of(affine.batch_bias, d_batch_bias);
    result[3] = gradient_of(affine.weight, d_weight);
    result[4] = gradient_of(affine.bias, d_bias);
    return result;
  }
};

bool requires_grad(const OptionalTensor& tensor) {
  return is_there(tensor) && tensor->requires_grad();
}

}  // namespace

Tensor batch_channel_norm(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                          Tensor& running_var, const OptionalTensor& counts,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          std::optional<double> rate, const OptionalTensor& rate_tensor, double eps,
                          bool from_batch) {
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Call call{num_groups,
                  {running_mean, running_var, counts, num_batches_tracked},
                  {rate, rate_tensor},
                  eps,
                  from_batch};
  const bool differentiable =
      at::GradMode::is_enabled() &&
      (x.requires_grad() || requires_grad(batch_weight) || requires_grad(batch_bias) ||
       requires_grad(weight) || requires_grad(bias));
  if (differentiable) return Normalize::apply(x, batch_weight, batch_bias, weight, bias, call);
  at::AutoDispatchBelowADInplaceOrView below;
  if (!call.rate.is_given()) return evaluate(x, affine, call);
  return std::get<0>(normalize_with_statistics(x, affine, call));
}

namespace {

// Above autograd and, for inference tensors, without it.
#define WSBCN_IMPLEMENT(key)                                \
  TORCH_LIBRARY_IMPL(wsbcn_mm, key, library) {              \
    library.impl("batch_channel_norm", batch_channel_norm); \
  }
WSBCN_IMPLEMENT(AutogradCPU)
WSBCN_IMPLEMENT(AutogradCUDA)
WSBCN_IMPLEMENT(CPU)
WSBCN_IMPLEMENT(CUDA)

}  // namespace
}  // namespace wsbcn
