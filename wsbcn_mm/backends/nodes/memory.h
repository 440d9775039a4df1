// Memory for large results that come and go with every step.
//
// The C library maps such memory anew each time, and the kernel clears every page of it when it is
// first touched: that takes longer than standardizing the weights. What is given back here is kept
// for the next result of the same size; what nobody asked for during a while is freed.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace wsbcn {

// A tensor in the memory of another one, `start` values from its first. As as_strided, which takes
// longer: a layer has ten of them.
at::Tensor part_of(const at::Tensor& memory, at::IntArrayRef shape, at::IntArrayRef strides,
                   int64_t start);

// Uninitialised, in the layout of `like`, which is dense.
at::Tensor result_like(const at::Tensor& like, at::ScalarType dtype);

// The same for several, all on one device. On a GPU in one block of memory, in which each starts
// where an allocation of its own might: allocations there take longer than the kernel.
std::vector<at::Tensor> results_like(at::TensorList like, at::ScalarType dtype);

// Frees what is kept for later.
void release_memory();

}  // namespace wsbcn
