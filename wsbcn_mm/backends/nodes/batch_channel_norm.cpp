// Batch-Channel Normalization with its gradients, as a node of torch's graph: what
// backends/autograd.py does for every backend, without Python in between, which takes longer than a
// small map. The second derivative goes back there (`normalize_twice`).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <array>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "batch_channel_norm.h"
#include "node.h"

namespace wsbcn {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
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
  if (gradient.scalar_type() == parameter->scalar_type()) return gradient;
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
    const auto has_changed = [](const Tensor& buffer) {
      if (buffer.defined() && !buffer.is_inference()) {
        buffer.unsafeGetTensorImpl()->bump_version();
      }
    };
    has_changed(running_mean);
    has_changed(running_var);
    if (call.running.num_batches_tracked) has_changed(*call.running.num_batches_tracked);
  }
  return {std::move(y),
          {std::move(m), std::move(q), std::move(mean), std::move(var), std::move(group_mean),
           std::move(inv_group_std)}};
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

struct NormalizeBackward : Node {
  NormalizeBackward(const Tensor& x, const Affine& affine, const Statistics& s, const Call& call)
      : num_groups(call.num_groups), eps(call.eps), from_batch(call.from_batch) {
    const auto& [m, q, mean, var, group_mean, inv_group_std] = s;
    const std::array<Tensor, kSaved> tensors{x,
                                             or_undefined(affine.batch_weight),
                                             or_undefined(affine.batch_bias),
                                             or_undefined(affine.weight),
                                             or_undefined(affine.bias),
                                             m,
                                             q,
                                             mean,
                                             var,
                                             group_mean,
                                             inv_group_std};
    for (size_t i = 0; i < kSaved; ++i) {
      if (tensors[i].defined()) saved[i] = SavedVariable(tensors[i], /*is_output=*/false);
      there[i] = tensors[i].defined();
    }
  }

  std::string name() const override { return "BatchChannelNormBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> guard(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    std::array<Tensor, kSaved> t;
    for (size_t i = 0; i < kSaved; ++i) {
      if (there[i]) t[i] = saved[i].unpack();
    }
    const Tensor& x = t[0];
    const Tensor grad = grads[0].defined() ? std::move(grads[0]) : at::zeros_like(x);
    const Affine affine{optional(t[1]), optional(t[2]), optional(t[3]), optional(t[4])};
    const Statistics s{t[5], t[6], t[7], t[8], t[9], t[10]};
    variable_list result(kInputs);
    if (is_differentiated(grad)) {
      const OptionalTensor none;
      auto gradients = normalize_twice(grad, x, num_groups, from_batch ? none : s.mean,
                                       from_batch ? none : s.var, affine, eps);
      for (size_t i = 0, next = 0; i < kInputs; ++i) {
        if (t[i].defined() && t[i].requires_grad()) result[i] = gradients[next++];
      }
      return result;
    }
    at::AutoDispatchBelowADInplaceOrView below;
    auto [dx, d_batch_weight, d_batch_bias, d_weight, d_bias] =
        normalize_backward(grad, x, num_groups, s, affine, eps, from_batch);
    result[0] = std::move(dx);
    result[1] = gradient_of(affine.batch_weight, std::move(d_batch_weight));
    result[2] = gradient_of(affine.batch_bias, std::move(d_batch_bias));
    result[3] = gradient_of(affine.weight, std::move(d_weight));
    result[4] = gradient_of(affine.bias, std::move(d_bias));
    return result;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> guard(mutex_);
    released = true;
    for (SavedVariable& variable : saved) variable.reset_data();
  }

  static constexpr size_t kInputs = 5, kSaved = 11;
  std::array<SavedVariable, kSaved> saved;
  std::array<bool, kSaved> there;
  const int64_t num_groups;
  const double eps;
  const bool from_batch;
  bool released = false;
};

bool has_tangent(const OptionalTensor& tensor) {
  return is_there(tensor) && tensor->_fw_grad(0).defined();
}

Tensor normalize_with_node(const Tensor& x, const Affine& affine, const Call& call) {
  const auto& [batch_weight, batch_bias, weight, bias] = affine;
  TORCH_CHECK_NOT_IMPLEMENTED(
      !x._fw_grad(0).defined() && !has_tangent(batch_weight) && !has_tangent(batch_bias) &&
          !has_tangent(weight) && !has_tangent(bias),
      "wsbcn_mm::batch_channel_norm has no forward-mode derivative: call the layer or "
      "wsbcn_mm.functional.batch_channel_norm, which have one");
  auto [y, s] = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return normalize_with_statistics(x, affine, call);
  }();
  const NodePointer node = owned(std::make_unique<NormalizeBackward>(x, affine, s, call));
  node->set_next_edges(
      torch::autograd::collect_next_edges(x, batch_weight, batch_bias, weight, bias));
  torch::autograd::set_history(y, node);
  return y;
}

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
  const bool recorded = at::GradMode::is_enabled();
  TORCH_CHECK_VALUE(
      !recorded || !(running_mean.requires_grad() || running_var.requires_grad()),
      "the running statistics must not require a gradient: they are no parameters\n  got ",
      running_mean.requires_grad() ? "a running_mean" : "a running_var",
      " that does\n  detach() it, or call under torch.no_grad()");
  const bool differentiable =
      recorded &&
      (x.requires_grad() || requires_grad(batch_weight) || requires_grad(batch_bias) ||
       requires_grad(weight) || requires_grad(bias));
  if (differentiable) return normalize_with_node(x, affine, call);
  at::AutoDispatchBelowADInplaceOrView below;
  if (!call.rate.is_given()) return evaluate(x, affine, call);
  return std::get<0>(normalize_with_statistics(x, affine, call));
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_with_given(
    const Tensor& x, int64_t num_groups, const Tensor& mean, const Tensor& var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  const Call call{num_groups, {mean, var, {}, {}}, {}, eps, /*from_batch=*/false};
  const auto [y, s] =
      normalize_with_statistics(x, {batch_weight, batch_bias, weight, bias}, call);
  return {y, s.m, s.q, s.mean, s.var, s.group_mean, s.inv_group_std};
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CompositeExplicitAutograd, library) {
  library.impl("normalize_with_given", normalize_with_given);
}

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
