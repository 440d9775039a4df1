// Memory for small results and for what kernels hand to each other: one allocation for all of it.
#pragma once

#include <c10/util/SmallVector.h>

#include <initializer_list>
#include <vector>

#include "launch.h"

namespace wsbcn::gpu {

// Uninitialised tensors in the accumulation dtype of x.
std::vector<Tensor> small_results(const Tensor& x, std::initializer_list<at::IntArrayRef> shapes);

// The same for what no one but kernels sees.
class Scratch {
 public:
  Scratch(const Tensor& x, std::initializer_list<int64_t> sizes);

  Pointer operator[](size_t index) const;

 private:
  Tensor memory_;
  c10::SmallVector<int64_t, 9> starts_;  // in bytes
};

}  // namespace wsbcn::gpu
