// What travels together, as in backends/carriers.py; the order of arguments stands in
// backends/ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <optional>

namespace wsbcn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline bool is_there(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

inline int64_t size_of(const OptionalTensor& tensor) {
  return is_there(tensor) ? tensor->numel() : 0;
}

// The buffers of a layer, updated in place.
struct Running {
  Tensor mean, var;
  OptionalTensor counts, num_batches_tracked;
};

// Scales and shifts of both stages.
struct Affine {
  OptionalTensor batch_weight, batch_bias, weight, bias;

  // Of the gradients of weight and bias.
  int64_t outer_size() const { return std::max(size_of(weight), size_of(bias)); }
};

// The weight of a new observation: a number, a tensor, or none, where nothing is updated.
struct Rate {
  std::optional<double> number;
  OptionalTensor tensor;

  bool is_given() const { return number.has_value() || is_there(tensor); }
  double value() const { return is_there(tensor) ? tensor->item<double>() : number.value_or(0); }
};

// What the forward pass found, which the backward pass needs.
struct Statistics {
  Tensor m, q, mean, var, group_mean, inv_group_std;
};

// Whether the gradients that come of a gradient are differentiated again: by a graph, or because a
// tangent goes along, of which kernels know nothing.
inline bool is_differentiated(const Tensor& grad) {
  return at::GradMode::is_enabled() || grad._fw_grad(0).defined();
}

// The memory format of a dense tensor.
inline at::MemoryFormat layout_of(const Tensor& x) {
  if (x.is_contiguous()) return at::MemoryFormat::Contiguous;
  return x.dim() == 4 ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::ChannelsLast3d;
}

inline bool is_dense(const Tensor& x) {
  return x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast) ||
         x.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

}  // namespace wsbcn
