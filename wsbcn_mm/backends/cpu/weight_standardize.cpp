// Weight Standardization on the CPU; the contract and the formulas stand in backends/ops.py.
//
// A row, one output channel, fits into the first-level cache: a thread reads it from memory once.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <tuple>

#include "rows.h"

namespace wsbcn {
namespace {

using at::Tensor;

constexpr int64_t kGrain = 16384;

enum class Formula { paper, var_eps, std_eps };

Formula parse(std::string_view name) {
  if (name == "paper") return Formula::paper;
  if (name == "var_eps") return Formula::var_eps;
  TORCH_CHECK(name == "std_eps", "unknown formula ", name);
  return Formula::std_eps;
}

// Rows must be dense, in whatever order; the standardization does not see the order.
bool rows_are_dense(const Tensor& w) {
  return w.is_contiguous() || w.is_contiguous(at::MemoryFormat::ChannelsLast) ||
      w.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

template <typename Row>
void over_rows(const Tensor& w, const Row& row) {
  const int64_t n = w.numel() / w.size(0);
  at::parallel_for(0, w.size(0), std::max<int64_t>(1, kGrain / n), [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) row(i, n);
  });
}

// T: of the weight, U: of the result.
template <typename T, typename U>
void standardize_rows(
    const Tensor& weight, const Tensor& w_hat, const Tensor& mean, const Tensor& sigma, double eps,
    Formula kind) {
  using A = Accumulate<T>;
  const T* w = weight.const_data_ptr<T>();
  U* out = w_hat.data_ptr<U>();
  A *means = mean.data_ptr<A>(), *sigmas = sigma.data_ptr<A>();
  over_rows(weight, [&](int64_t i, int64_t n) {
    double centre, variance;
    rows_moments(w + i * n, 1, n, &centre, &variance);
    if (kind != Formula::paper) variance *= static_cast<double>(n) / (n - 1);
    const double s = std::sqrt(kind == Formula::std_eps ? variance : variance + eps);
    const double denominator = kind == Formula::std_eps ? s + eps : s;
    means[i] = static_cast<A>(centre);
    sigmas[i] = static_cast<A>(s);
    // (x - m) is exact to A; what m lost by rounding goes into the shift.
    const A scale = static_cast<A>(1 / denominator);
    const A shift = static_cast<A>((means[i] - centre) / denominator);
    rows_affine(w + i * n, out + i * n, 1, n, &means[i], &scale, &shift);
  });
}

std::tuple<Tensor, Tensor, Tensor> standardize(
    const Tensor& weight, double eps, std::string_view formula, at::ScalarType dtype) {
  TORCH_CHECK(weight.numel() > 0 && rows_are_dense(weight), "weight must be dense, not empty");
  const Formula kind = parse(formula);
  const auto statistics = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const bool lowered = weight.scalar_type() == at::kFloat &&
      (dtype == at::kBFloat16 || dtype == at::kHalf);
  Tensor w_hat = at::empty_like(weight, weight.options().dtype(
      lowered ? dtype : weight.scalar_type()));
  Tensor mean = at::empty({weight.size(0)}, weight.options().dtype(statistics));
  Tensor sigma = at::empty_like(mean);
  if (lowered && dtype == at::kBFloat16) {
    standardize_rows<float, c10::BFloat16>(weight, w_hat, mean, sigma, eps, kind);
  } else if (lowered) {
    standardize_rows<float, c10::Half>(weight, w_hat, mean, sigma, eps, kind);
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, weight.scalar_type(), "standardize",
        [&] { standardize_rows<scalar_t, scalar_t>(weight, w_hat, mean, sigma, eps, kind); });
  }
  return {w_hat.to(dtype), mean, sigma};
}

Tensor standardize_backward(
    const Tensor& grad, const Tensor& weight, const Tensor& mean, const Tensor& sigma, double eps,
    std::string_view formula) {
  TORCH_CHECK(weight.numel() > 0 && rows_are_dense(weight), "weight must be dense, not empty");
  const Formula kind = parse(formula);
  Tensor g_like = at::empty_like(weight);
  const Tensor g =
      grad.scalar_type() == weight.scalar_type() && grad.strides() == weight.strides()
      ? grad
      : g_like.copy_(grad);
  Tensor dw = at::empty_like(weight);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, weight.scalar_type(), "standardize_backward", [&] {
    using A = Accumulate<scalar_t>;
    const scalar_t* gs = g.const_data_ptr<scalar_t>();
    const scalar_t* w = weight.const_data_ptr<scalar_t>();
    scalar_t* out = dw.data_ptr<scalar_t>();
    const A *means = mean.const_data_ptr<A>(), *sigmas = sigma.const_data_ptr<A>();
    over_rows(weight, [&](int64_t i, int64_t n) {
      double sum_g, sum_gw;
      rows_dots(gs + i * n, w + i * n, 1, n, &means[i], &sum_g, &sum_gw);
      const double s = sigmas[i], d = kind == Formula::std_eps ? s + eps : s;
      const double freedom = kind == Formula::paper ? n : n - 1;
      const double k = s > 0 ? 1 / (freedom * s * d * d) : 0;
      const A of_g = static_cast<A>(1 / d), of_w = static_cast<A>(-k * sum_gw);
      const A offset = static_cast<A>(-sum_g / (n * d));
      rows_gradient(gs + i * n, w + i * n, out + i * n, 1, n, &means[i], &of_g, &of_w, &offset);
    });
  });
  return dw;
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CPU, library) {
  library.impl("standardize", standardize);
  library.impl("standardize_backward", standardize_backward);
}

}  // namespace
}  // namespace wsbcn
