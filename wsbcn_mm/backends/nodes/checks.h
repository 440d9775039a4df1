// What the kernels read and write through pointers has the size and type that they expect. Layers
// do not ask: parameters may have been replaced since they were made.
#pragma once

#include "carriers.h"

namespace wsbcn {

// x as the kernels read it, dense: a copy where it comes in another layout, as in compiled and
// exported code, which brings others than it was traced with. (N, C, *), not empty, and C is
// divided by num_groups.
Tensor checked_input(const Tensor& x, int64_t num_groups);
void check_running(const Running& running, const Tensor& x);
void check_affine(const Affine& affine, const Tensor& x, int64_t num_groups);
void check_statistics(const Statistics& statistics, const Tensor& x, int64_t num_groups);
// A tensor of given shape, in the accumulation dtype of x.
void check_statistic(const Tensor& value, const char* name, at::IntArrayRef shape, const Tensor& x);
// The gradient of what has the shape and dtype of x.
void check_gradient(const Tensor& grad, const Tensor& x);
// (O, *), dense, not empty.
void check_weight(const Tensor& weight);

at::ScalarType accumulation_dtype(const Tensor& x);

}  // namespace wsbcn
