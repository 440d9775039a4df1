// Weight Standardization with its gradients, as a node of torch's graph: of one weight, or of many
// at once. The second derivative goes back to backends/autograd.py (`standardize_twice`).
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "memory.h"
#include "node.h"
#include "weight_standardize.h"

namespace wsbcn {
namespace {

using at::Tensor;
using at::TensorList;
using torch::autograd::Node;
using torch::autograd::variable_list;

// An operator of backends/ops.py; the signature is checked when it is first used.
template <typename Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void standardize_all(TensorList weights, double eps, std::string_view formula, TensorList out,
                     const Tensor& mean, const Tensor& sigma) {
  static const auto op = find<decltype(standardize_all)>("wsbcn_mm::standardize_all");
  op.call(weights, eps, formula, out, mean, sigma);
}

void standardize_all_backward(TensorList grads, TensorList weights, at::IntArrayRef offsets,
                              const Tensor& mean, const Tensor& sigma, double eps,
                              std::string_view formula, TensorList out) {
  static const auto op =
      find<decltype(standardize_all_backward)>("wsbcn_mm::standardize_all_backward");
  op.call(grads, weights, offsets, mean, sigma, eps, formula, out);
}

Tensor standardize_twice(const Tensor& grad, const Tensor& weight, double eps,
                         std::string_view formula) {
  static const auto op = find<decltype(standardize_twice)>("wsbcn_mm::standardize_twice");
  return op.call(grad, weight, eps, formula);
}

struct Standardized {
  variable_list w_hats;
  Tensor mean, sigma;
};

Standardized standardize(TensorList weights, double eps, std::string_view formula,
                         at::ScalarType dtype) {
  TORCH_CHECK(!weights.empty(), "there must be a weight");
  Standardized result;
  result.w_hats = results_like(weights, dtype);
  int64_t rows = 0;
  for (const Tensor& weight : weights) {
    rows += weight.size(0);
    // Channels were pruned since the layer was made; see checks.py.
    TORCH_CHECK_VALUE(weight.numel() > weight.size(0),
                      "weight standardization needs at least 2 weights per output channel\n  got a "
                      "weight of shape ",
                      weight.sizes(), ": its standardized value would be 0 whatever it is");
  }
  const auto statistics = weights[0].scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  result.mean = at::empty({rows}, weights[0].options().dtype(statistics));
  result.sigma = at::empty_like(result.mean);
  standardize_all(weights, eps, formula, result.w_hats, result.mean, result.sigma);
  return result;
}

int64_t version_of(const Tensor& weight) {
  return weight.is_inference() ? 0 : static_cast<int64_t>(weight._version());
}

// Whether the gradient may be overwritten: nobody else has it, and it lies as the weight does.
bool is_ours(const Tensor& grad, const Tensor& weight) {
  return grad.use_count() == 1 && grad.storage().use_count() == 1 &&
         grad.scalar_type() == weight.scalar_type() && grad.strides() == weight.strides() &&
         grad.is_non_overlapping_and_dense() && !grad.is_inference();
}

bool have_one_dtype(const variable_list& grads) {
  std::optional<at::ScalarType> dtype;
  for (const Tensor& grad : grads) {
    if (!grad.defined()) continue;
    if (dtype && *dtype != grad.scalar_type()) return false;
    dtype = grad.scalar_type();
  }
  return true;
}

std::atomic<int64_t> backward_calls_so_far{0};

// Where Python reads it, as a plain number.
static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t) &&
              std::atomic<int64_t>::is_always_lock_free);

int64_t backward_calls_address() {
  return reinterpret_cast<int64_t>(&backward_calls_so_far);
}

struct StandardizeBackward : Node {
  StandardizeBackward(TensorList of, double eps, std::string_view formula, Standardized& result)
      : weights(of.vec()), mean(result.mean), sigma(result.sigma), eps(eps), formula(formula) {
    versions.reserve(weights.size());
    first_rows.reserve(weights.size());
    int64_t rows = 0;
    for (const Tensor& weight : weights) {
      versions.push_back(version_of(weight));
      first_rows.push_back(rows);
      rows += weight.size(0);
    }
  }

  std::string name() const override { return "WeightStandardizeBackward"; }

  // A weight that was not used, or not joined to the graph, has no gradient and gets none.
  variable_list apply(variable_list&& grads) override {
    ++backward_calls_so_far;
    variable_list result(weights.size());
    variable_list used_grads, used_weights, out;
    std::vector<int64_t> offsets;
    std::vector<size_t> places;
    for (auto* list : {&used_grads, &used_weights, &out}) list->reserve(weights.size());
    offsets.reserve(weights.size());
    places.reserve(weights.size());
    // The kernels of a GPU read what the convolutions of autocast give.
    const bool reads_any = weights[0].is_cuda() && have_one_dtype(grads);
    for (size_t k = 0; k < weights.size(); ++k) {
      const Tensor& weight = weights[k];
      if (!grads[k].defined()) continue;
      TORCH_CHECK(
          version_of(weight) == versions[k] && weight.sizes() == grads[k].sizes(),
          "a weight was modified by an inplace operation between the forward pass that "
          "standardized it and the backward pass\n  call backward() before the optimizer's step "
          "and before editing weights");
      if (is_differentiated(grads[k])) {
        result[k] = standardize_twice(grads[k], weight, eps, formula);
        continue;
      }
      places.push_back(k);
      offsets.push_back(first_rows[k]);
      used_weights.push_back(weight);
      if (is_ours(grads[k], weight)) {
        out.push_back(grads[k]);
      } else {
        out.push_back(result_like(weight, weight.scalar_type()));
        const bool fits = grads[k].scalar_type() == weight.scalar_type() &&
                          grads[k].strides() == weight.strides();
        if (!fits && !reads_any) grads[k] = out.back().copy_(grads[k]);
      }
      used_grads.push_back(std::move(grads[k]));
    }
    if (places.empty()) return result;
    standardize_all_backward(used_grads, used_weights, offsets, mean, sigma, eps, formula, out);
    for (size_t j = 0; j < places.size(); ++j) result[places[j]] = std::move(out[j]);
    return result;
  }

  // Not SavedVariables, which allow a single backward pass and count for activation checkpointing:
  // uses of a layer share the node. Torch's check for edits is then ours to make.
  const std::vector<Tensor> weights;
  std::vector<int64_t> versions, first_rows;
  const Tensor mean, sigma;
  const double eps;
  const std::string formula;
};

bool is_differentiable(TensorList weights) {
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor& weight : weights) {
    if (weight.requires_grad()) return true;
  }
  return false;
}

// weights dense, not empty, of one dtype and device.
variable_list apply(TensorList weights, double eps, std::string_view formula,
                    at::ScalarType dtype) {
  const bool differentiable = is_differentiable(weights);
  Standardized result = [&] {
    at::AutoDispatchBelowADInplaceOrView below;
    return standardize(weights, eps, formula, dtype);
  }();
  if (!differentiable) return std::move(result.w_hats);
  for (const Tensor& weight : weights) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        !weight._fw_grad(0).defined(),
        "wsbcn_mm::weight_standardize has no forward-mode derivative: call the layer or "
        "wsbcn_mm.functional.weight_standardize, which have one");
  }
  const NodePointer node =
      owned(std::make_unique<StandardizeBackward>(weights, eps, formula, result));
  node->set_next_edges(torch::autograd::collect_next_edges(weights));
  for (const Tensor& w_hat : result.w_hats) torch::autograd::set_history(w_hat, node);
  return std::move(result.w_hats);
}

}  // namespace

int64_t backward_calls() {
  return backward_calls_so_far;
}

Tensor weight_standardize(const Tensor& weight, double eps, std::string_view formula,
                          at::ScalarType dtype) {
  return apply(weight, eps, formula, dtype).front();
}

// The results belong to the graph one by one, as they are used (`join`): what is never used must
// look to hooks and to DistributedDataParallel as a weight that nobody read.
variable_list weight_standardize_all(TensorList weights, double eps, std::string_view formula,
                                     at::ScalarType dtype) {
  variable_list w_hats = apply(weights, eps, formula, dtype);
  // Not set_next_edge(), which refuses to change a node that has been used; that a node lies deeper
  // in the graph than its present edges say does no harm.
  if (const auto& node = w_hats.front().grad_fn()) {
    for (auto& edge : node->next_edges()) edge = torch::autograd::Edge();
  }
  return w_hats;
}

void join(const Tensor& w_hat, const Tensor& weight) {
  const auto& node = w_hat.grad_fn();
  TORCH_CHECK(dynamic_cast<StandardizeBackward*>(node.get()) != nullptr,
              "w_hat must be a result of weight_standardize_all that requires a gradient");
  const size_t place = w_hat.output_nr();
  TORCH_CHECK(place < node->next_edges().size(), "w_hat must be one of the results of its node");
  node->next_edges()[place] = torch::autograd::impl::gradient_edge(weight);
}

namespace {

// Above autograd and, for inference tensors, without it.
#define WSBCN_IMPLEMENT(key)                                        \
  TORCH_LIBRARY_IMPL(wsbcn_mm, key, library) {                      \
    library.impl("weight_standardize", weight_standardize);         \
    library.impl("weight_standardize_all", weight_standardize_all); \
  }
WSBCN_IMPLEMENT(AutogradCPU)
WSBCN_IMPLEMENT(AutogradCUDA)
WSBCN_IMPLEMENT(CPU)
WSBCN_IMPLEMENT(CUDA)

TORCH_LIBRARY_IMPL(wsbcn_mm, CompositeImplicitAutograd, library) {
  library.impl("join", join);
  library.impl("backward_calls_address", backward_calls_address);
}

}  // namespace
}  // namespace wsbcn
