#pragma once

#include "carriers.h"

namespace wsbcn {

// The operator of backends/ops.py, with autograd; x dense and not empty.
Tensor batch_channel_norm(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                          Tensor& running_var, const OptionalTensor& counts,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          std::optional<double> rate, const OptionalTensor& rate_tensor, double eps,
                          bool from_batch);

}  // namespace wsbcn
