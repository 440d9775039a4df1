// Memory for large results that come and go with every step.
//
// The C library maps such memory anew each time, and the kernel clears every page of it when it is
// first touched: that takes longer than standardizing the weights. What is given back here is kept
// for the next result of the same size; what nobody asked for during a while is freed.
#pragma once

#include <ATen/ATen.h>

namespace wsbcn {

// Uninitialised, in the layout of `like`, which is dense.
at::Tensor result_like(const at::Tensor& like, at::ScalarType dtype);

// Frees what is kept for later.
void release_memory();

}  // namespace wsbcn
