// Nodes of torch's graph that are classes of their own. Not torch::autograd::Function, which takes
// as long again as all that a layer does.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/function.h>

#include <memory>
#include <type_traits>
#include <utility>

namespace wsbcn {

// What a tensor holds its node by: torch's versions have had two kinds.
using NodePointer = std::decay_t<decltype(std::declval<at::Tensor>().grad_fn())>;

template <typename Pointer = NodePointer>
Pointer owned(std::unique_ptr<torch::autograd::Node> node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) {
    return Pointer(node.release(), [](auto* made) { deleteNode(made); });
  } else {
    return Pointer(std::move(node));
  }
}

}  // namespace wsbcn
