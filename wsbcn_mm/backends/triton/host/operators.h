// The operators of backends/ops.py for a GPU, with the arguments of their schemas.
#pragma once

#include <string_view>
#include <tuple>

#include "../../nodes/carriers.h"

namespace wsbcn::gpu {

using Flat = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

std::tuple<Tensor, Tensor> row_moments(const Tensor& x);

Flat normalize_with_estimates(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                              Tensor& running_var, const OptionalTensor& counts,
                              const OptionalTensor& num_batches_tracked,
                              const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              std::optional<double> rate, const OptionalTensor& rate_tensor,
                              double eps);

Flat normalize_with_batch(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                          Tensor& running_var, const OptionalTensor& counts,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          std::optional<double> rate, const OptionalTensor& rate_tensor,
                          double eps);

Tensor evaluate(const Tensor& x, int64_t num_groups, const Tensor& running_mean,
                const Tensor& running_var, const OptionalTensor& counts,
                const OptionalTensor& num_batches_tracked, const OptionalTensor& batch_weight,
                const OptionalTensor& batch_bias, const OptionalTensor& weight,
                const OptionalTensor& bias, double eps);

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& x, int64_t num_groups, const Tensor& m,
                                             const Tensor& q, const Tensor& mean, const Tensor& var,
                                             const OptionalTensor& batch_weight,
                                             const OptionalTensor& batch_bias,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, int64_t num_groups, const Tensor& m, const Tensor& q,
    const Tensor& mean, const Tensor& var, const Tensor& group_mean, const Tensor& inv_group_std,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool through_statistics);

std::tuple<Tensor, Tensor, Tensor> standardize(const Tensor& weight, double eps,
                                               std::string_view formula, at::ScalarType dtype);

Tensor standardize_backward(const Tensor& grad, const Tensor& weight, const Tensor& mean,
                            const Tensor& sigma, double eps, std::string_view formula);

void standardize_all(at::TensorList weights, double eps, std::string_view formula,
                     at::TensorList out, const Tensor& mean, const Tensor& sigma);

void standardize_all_backward(at::TensorList grads, at::TensorList weights, at::IntArrayRef offsets,
                              const Tensor& mean, const Tensor& sigma, double eps,
                              std::string_view formula, at::TensorList out);

}  // namespace wsbcn::gpu
