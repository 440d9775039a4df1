// Operators of backends/ops.py, with autograd.
#pragma once

#include <string_view>
#include <vector>

#include "carriers.h"

namespace wsbcn {

// weight dense and not empty.
Tensor weight_standardize(const Tensor& weight, double eps, std::string_view formula,
                          at::ScalarType dtype);

// Of many weights at once, and their gradients of a backward pass.
std::vector<Tensor> weight_standardize_all(at::TensorList weights, double eps,
                                           std::string_view formula, at::ScalarType dtype);

// How often a weight's gradient was computed in this process so far.
int64_t backward_calls();

}  // namespace wsbcn
