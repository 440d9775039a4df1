// Memory for small results and for what kernels hand to each other: one allocation for all of it,
// which takes as long as a launch.
#pragma once

#include <ATen/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <initializer_list>
#include <utility>
#include <vector>

#include "launch.h"

namespace wsbcn::gpu {

using Sizes = c10::SmallVector<int64_t, 9>;

// What no one but kernels sees, in the accumulation dtype of x.
class Scratch {
 public:
  Scratch(const Tensor& x, at::IntArrayRef sizes);
  // In a part of other memory.
  Scratch(const Tensor& memory, int64_t first, at::IntArrayRef sizes);

  Pointer operator[](size_t index) const;

 private:
  Tensor memory_;
  Sizes starts_;  // in bytes
};

using Shapes = std::initializer_list<at::IntArrayRef>;

// Uninitialised tensors in the accumulation dtype of x.
std::vector<Tensor> small_results(const Tensor& x, Shapes shapes);

// The same and scratch, which lives as long as they do where there is little of it.
std::pair<std::vector<Tensor>, Scratch> small_results(const Tensor& x, Shapes shapes,
                                                      at::IntArrayRef scratch);

}  // namespace wsbcn::gpu
