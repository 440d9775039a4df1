// Weight Standardization with its gradients, as nodes of torch's graph: of one weight, or of many
// at once. The second derivative goes back to backends/autograd.py (`standardize_twice`).
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/anomaly_mode.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
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

std::tuple<Tensor, Tensor, Tensor> standardize_one(const Tensor& weight, double eps,
                                                   std::string_view formula,
                                                   at::ScalarType dtype) {
  static const auto op = find<decltype(standardize_one)>("wsbcn_mm::standardize");
  return op.call(weight, eps, formula, dtype);
}

Tensor standardize_one_backward(const Tensor& grad, const Tensor& weight, const Tensor& mean,
                                const Tensor& sigma, double eps, std::string_view formula) {
  static const auto op =
      find<decltype(standardize_one_backward)>("wsbcn_mm::standardize_backward");
  return op.call(grad, weight, mean, sigma, eps, formula);
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

// Whether somebody may write down or keep what operators give (make_fx, selective checkpointing):
// then they must give their results, and not fill memory that came from elsewhere.
bool are_operators_kept() {
  return c10::impl::TorchDispatchModeTLS::any_modes_set();
}

// Channels may have been pruned since the layer was made; see checks.py.
void check_fan_in(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.numel() > weight.size(0),
                    "weight standardization needs at least 2 weights per output channel\n  got a "
                    "weight of shape ",
                    weight.sizes(), ": its standardized value would be 0 whatever it is");
}

Standardized standardize(TensorList weights, double eps, std::string_view formula,
                         at::ScalarType dtype) {
  TORCH_CHECK(!weights.empty(), "there must be a weight");
  Standardized result;
  if (weights.size() == 1 && are_operators_kept()) {
    check_fan_in(weights[0]);
    Tensor w_hat;
    std::tie(w_hat, result.mean, result.sigma) = standardize_one(weights[0], eps, formula, dtype);
    result.w_hats.push_back(std::move(w_hat));
    return result;
  }
  result.w_hats = results_like(weights, dtype);
  int64_t rows = 0;
  for (const Tensor& weight : weights) {
    rows += weight.size(0);
    check_fan_in(weight);
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

std::atomic<int64_t> backward_calls_so_far{0};

// Where Python reads it, as a plain number.
static_assert(sizeof(std::atomic<int64_t>) == sizeof(int64_t) &&
              std::atomic<int64_t>::is_always_lock_free);

int64_t backward_calls_address() {
  return reinterpret_cast<int64_t>(&backward_calls_so_far);
}

// A gradient that waits for those of the same backward pass, and the memory of the result.
struct Waiting {
  int task;  // the backward pass
  size_t place;
  Tensor grad, out;
};

bool have_one_dtype(const std::vector<Waiting>& all) {
  for (const Waiting& one : all) {
    if (one.grad.scalar_type() != all[0].grad.scalar_type()) return false;
  }
  return true;
}

// Whether anything but a weight's gradient shows that a backward pass has come to it: hooks, as
// those of DistributedDataParallel, or a node in front of it.
bool is_watched(const torch::autograd::Edge& edge) {
  const auto& node = edge.function;
  return node && (node->num_outputs() != 0 || !node->tensor_pre_hooks().empty() ||
                  !node->pre_hooks().empty() || !node->post_hooks().empty() ||
                  node->tensor_post_acc_grad_hooks() != nullptr);
}

// What the nodes of weights know that were standardized by one call.
struct Together {
  // Not SavedVariables, which allow a single backward pass and count for activation checkpointing:
  // uses of a layer share the node. Torch's check for edits is then ours to make.
  const std::vector<Tensor> weights;
  std::vector<int64_t> versions, first_rows;
  const Tensor mean, sigma;
  const double eps;
  const std::string formula;

  Together(TensorList of, double eps, std::string_view formula, const Standardized& result)
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

  // The gradient of a weight from that of its result. Where no graph of it is wanted, its memory:
  // its values come with `compute`.
  Tensor receive(size_t place, Tensor grad) {
    const Tensor& weight = weights[place];
    TORCH_CHECK(
        version_of(weight) == versions[place] && weight.sizes() == grad.sizes(),
        "a weight was modified by an inplace operation between the forward pass that "
        "standardized it and the backward pass\n  call backward() before the optimizer's step "
        "and before editing weights");
    if (is_differentiated(grad)) return standardize_twice(grad, weight, eps, formula);
    if (are_operators_kept()) {
      const int64_t first = first_rows[place], rows = weight.size(0);
      return standardize_one_backward(grad, weight, mean.narrow(0, first, rows),
                                      sigma.narrow(0, first, rows), eps, formula);
    }
    Tensor out = is_ours(grad, weight) ? grad : result_like(weight, weight.scalar_type());
    const std::lock_guard<std::mutex> guard(mutex);
    if (waiting.empty()) waiting.reserve(weights.size());
    waiting.push_back({torch::autograd::get_current_graph_task_id(), place, std::move(grad), out});
    return out;
  }

  // Of all that wait in this backward pass, by one call.
  void compute() {
    std::vector<Waiting> all = those_of(torch::autograd::get_current_graph_task_id());
    if (all.empty()) return;
    // Whatever the order in which they came: launchers keep tables of what they were called with.
    std::sort(all.begin(), all.end(),
              [](const Waiting& one, const Waiting& other) { return one.place < other.place; });
    variable_list used_grads, used_weights, out;
    std::vector<int64_t> offsets;
    for (auto* list : {&used_grads, &used_weights, &out}) list->reserve(all.size());
    offsets.reserve(all.size());
    // The kernels of a GPU read what the convolutions of autocast give.
    const bool reads_any = weights[0].is_cuda() && have_one_dtype(all);
    for (Waiting& one : all) {
      const Tensor& weight = weights[one.place];
      const bool fits = one.grad.scalar_type() == weight.scalar_type() &&
                        one.grad.strides() == weight.strides();
      offsets.push_back(first_rows[one.place]);
      used_weights.push_back(weight);
      used_grads.push_back(fits || reads_any ? std::move(one.grad) : one.out.copy_(one.grad));
      out.push_back(std::move(one.out));
    }
    at::AutoDispatchBelowADInplaceOrView below;
    standardize_all_backward(used_grads, used_weights, offsets, mean, sigma, eps, formula, out);
  }

 private:
  // Takes them out. Of another one: that failed, or runs within this one or in another thread.
  std::vector<Waiting> those_of(int task) {
    const std::lock_guard<std::mutex> guard(mutex);
    std::vector<Waiting> others, all;
    for (Waiting& one : waiting) (one.task == task ? all : others).push_back(std::move(one));
    waiting = std::move(others);
    return all;
  }

  std::mutex mutex;
  std::vector<Waiting> waiting;
};

// Of one weight, or of several that nobody watches: those that a loss does not depend on get no
// gradient, but are visited.
struct StandardizeBackward : Node {
  explicit StandardizeBackward(std::shared_ptr<Together> together)
      : together(std::move(together)) {}

  std::string name() const override { return "WeightStandardizeBackward"; }

  variable_list apply(variable_list&& grads) override {
    ++backward_calls_so_far;
    for (size_t k = 0; k < grads.size(); ++k) {
      if (grads[k].defined()) {
        grads[k] = together->receive(k, std::move(grads[k]));
      } else {
        TORCH_CHECK(grads.size() == 1 || !is_watched(next_edge(k)),
                    "a hook was set on a weight between the forward pass that standardized it and "
                    "the backward pass of a loss that does not depend on it\n  set it before the "
                    "forward pass");
      }
    }
    together->compute();
    return std::move(grads);
  }

  const std::shared_ptr<Together> together;
};

// Of one of several that are watched. Torch runs the node first that was made last: these are made
// after those that they lead to, and both before the convolutions. When the first of the others
// runs, all gradients of this backward pass that there will be have come.
struct ReceiveBackward : Node {
  ReceiveBackward(std::shared_ptr<Together> together, size_t place)
      : together(std::move(together)), place(place) {}

  std::string name() const override { return "WeightStandardizeBackward"; }

  variable_list apply(variable_list&& grads) override {
    ++backward_calls_so_far;
    if (grads[0].defined()) grads[0] = together->receive(place, std::move(grads[0]));
    // Who looks at what goes from here to the next node: anomaly mode, hooks, `autograd.grad`.
    const auto* asked_for = torch::autograd::get_current_graph_task_exec_info();
    Node& next = *next_edge(0).function;
    const bool is_seen = torch::autograd::AnomalyMode::is_enabled() || !post_hooks().empty() ||
                         !next.pre_hooks().empty() || !next.tensor_pre_hooks().empty() ||
                         (asked_for != nullptr && !asked_for->empty());
    if (is_seen) together->compute();
    return std::move(grads);
  }

  const std::shared_ptr<Together> together;
  const size_t place;
};

struct ComputeBackward : Node {
  explicit ComputeBackward(std::shared_ptr<Together> together) : together(std::move(together)) {}

  std::string name() const override { return "WeightStandardizeTogetherBackward"; }

  variable_list apply(variable_list&& grads) override {
    together->compute();
    return std::move(grads);
  }

  const std::shared_ptr<Together> together;
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
  const auto together = std::make_shared<Together>(weights, eps, formula, result);
  torch::autograd::edge_list edges = torch::autograd::collect_next_edges(weights);
  if (weights.size() == 1 || std::none_of(edges.begin(), edges.end(), is_watched)) {
    const NodePointer node = owned(std::make_unique<StandardizeBackward>(together));
    node->set_next_edges(std::move(edges));
    for (const Tensor& w_hat : result.w_hats) torch::autograd::set_history(w_hat, node);
    return std::move(result.w_hats);
  }
  for (size_t k = 0; k < weights.size(); ++k) {
    const NodePointer node = owned(std::make_unique<ComputeBackward>(together));
    // Not the weight's: where its `grad_dtype` is another one, torch would convert what comes here,
    // which has no values yet.
    const Tensor& w = weights[k];
    node->add_input_metadata(part_of(w, w.sizes(), w.strides(), 0));
    node->add_next_edge(std::move(edges[k]));
    edges[k] = torch::autograd::Edge(node, 0);
  }
  for (size_t k = 0; k < weights.size(); ++k) {
    const NodePointer node = owned(std::make_unique<ReceiveBackward>(together, k));
    node->add_next_edge(std::move(edges[k]));
    torch::autograd::set_history(result.w_hats[k], node);
  }
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

variable_list weight_standardize_all(TensorList weights, double eps, std::string_view formula,
                                     at::ScalarType dtype) {
  return apply(weights, eps, formula, dtype);
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
  library.impl("backward_calls_address", backward_calls_address);
}

}  // namespace
}  // namespace wsbcn
