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
#include <vector>

#include "rows.h"

namespace wsbcn {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kGrain = 16384;

// In standard deviations.
constexpr double kLargeMean = 8;

enum class Formula { paper, var_eps, std_eps };

Formula parse(std::string_view name) {
  if (name == "paper") return Formula::paper;
  if (name == "var_eps") return Formula::var_eps;
  TORCH_CHECK(name == "std_eps", "unknown formula ", name);
  return Formula::std_eps;
}

at::ScalarType statistics_of(const Tensor& weight) {
  return weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Rows must be dense, in whatever order; the standardization does not see the order.
bool rows_are_dense(const Tensor& w) {
  return w.is_contiguous() || w.is_contiguous(at::MemoryFormat::ChannelsLast) ||
         w.is_contiguous(at::MemoryFormat::ChannelsLast3d);
}

void check_weights(TensorList weights) {
  TORCH_CHECK(!weights.empty(), "there must be a weight");
  for (const Tensor& weight : weights) {
    TORCH_CHECK(weight.is_cpu() && weight.dim() > 0 && weight.numel() > 0 && rows_are_dense(weight),
                "weights must be dense, not empty and on the CPU");
    TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type(),
                "weights must have one dtype, got ", weight.scalar_type(), " and ",
                weights[0].scalar_type());
  }
}

// What belongs to `weights` must lie as they do: the kernels go through both side by side.
void check_like(TensorList weights, TensorList others, const char* name) {
  TORCH_CHECK(others.size() == weights.size(), name, ": expected ", weights.size(),
              " tensors, got ", others.size());
  for (size_t k = 0; k < weights.size(); ++k) {
    TORCH_CHECK(others[k].is_cpu() && others[k].sizes() == weights[k].sizes() &&
                    others[k].strides() == weights[k].strides() &&
                    others[k].scalar_type() == others[0].scalar_type(),
                name, " must be on the CPU, of one dtype, with sizes and strides of its weight, ",
                weights[k].sizes(), ", got ", others[k].sizes());
  }
}

void check_statistics(const Tensor& weight, int64_t rows, const Tensor& values, const char* name) {
  TORCH_CHECK(values.is_cpu() && values.is_contiguous() && values.numel() >= rows &&
                  values.scalar_type() == statistics_of(weight),
              name, " must hold ", rows, " values of ", statistics_of(weight), " on the CPU");
}

// Writes a row of n values, which the cache holds, in pieces: write(first, count). Meanwhile
// memory, which would have nothing to bring, brings the row behind it of what is read.
template <typename T, size_t count, typename Write>
void write_row(int64_t n, bool is_last, const T* const (&reads)[count], const Write& write) {
  constexpr int64_t kPiece = 1024 / sizeof(T), kLine = 64 / sizeof(T);
  for (int64_t first = 0; first < n;) {
    const int64_t end = n - first < 2 * kPiece ? n : first + kPiece;
    for (int64_t j = n + first; j < n + end && !is_last; j += kLine) {
      for (const T* read : reads) __builtin_prefetch(read + j);
    }
    write(first, end - first);
    first = end;
  }
}

// Calls row(k, i, n) for each row i of each weight k, n its length. Threads share the values
// evenly; a row belongs to the thread in whose share it begins.
template <typename Row>
void over_rows(TensorList weights, const Row& row) {
  std::vector<int64_t> starts{0};
  for (const Tensor& weight : weights) starts.push_back(starts.back() + weight.numel());
  at::parallel_for(0, starts.back(), kGrain, [&](int64_t begin, int64_t end) {
    auto next = std::upper_bound(starts.begin(), starts.end(), begin);
    for (size_t k = next - starts.begin() - 1; k < weights.size() && starts[k] < end; ++k) {
      const int64_t rows = weights[k].size(0), n = weights[k].numel() / rows;
      int64_t i = begin > starts[k] ? (begin - starts[k] + n - 1) / n : 0;
      for (; i < rows && starts[k] + i * n < end; ++i) row(k, i, n);
    }
  });
}

// First row of each weight among those of all.
std::vector<int64_t> offsets_of(TensorList weights) {
  std::vector<int64_t> offsets{0};
  for (const Tensor& weight : weights) offsets.push_back(offsets.back() + weight.size(0));
  return offsets;
}

// T: of the weights, U: of the results.
template <typename T, typename U>
void standardize_rows(TensorList weights, TensorList out, const Tensor& mean, const Tensor& sigma,
                      double eps, Formula kind) {
  using A = Accumulate<T>;
  std::vector<const T*> from;
  std::vector<U*> to;
  for (const Tensor& weight : weights) from.push_back(weight.const_data_ptr<T>());
  for (const Tensor& w_hat : out) to.push_back(w_hat.mutable_data_ptr<U>());
  A *means = mean.mutable_data_ptr<A>(), *sigmas = sigma.mutable_data_ptr<A>();
  const auto offsets = offsets_of(weights);
  over_rows(weights, [&](size_t k, int64_t i, int64_t n) {
    const T* w = from[k] + i * n;
    const int64_t at = offsets[k] + i;
    double centre, variance;
    rows_moments(w, 1, n, &centre, &variance);
    if (kind != Formula::paper) variance *= static_cast<double>(n) / (n - 1);
    const double s = std::sqrt(kind == Formula::std_eps ? variance : variance + eps);
    const double denominator = kind == Formula::std_eps ? s + eps : s;
    means[at] = static_cast<A>(centre);
    sigmas[at] = static_cast<A>(s);
    // (x - m) is exact to A; what m lost by rounding goes into the shift.
    const A scale = static_cast<A>(1 / denominator);
    const A shift = static_cast<A>((means[at] - centre) / denominator);
    U* const y = to[k] + i * n;
    write_row(n, i + 1 == weights[k].size(0), {w}, [&](int64_t first, int64_t count) {
      rows_affine(w + first, y + first, 1, count, &means[at], &scale, &shift);
    });
  });
}

void standardize_all(TensorList weights, double eps, std::string_view formula, TensorList out,
                     const Tensor& mean, const Tensor& sigma) {
  check_weights(weights);
  check_like(weights, out, "out");
  const int64_t rows = offsets_of(weights).back();
  check_statistics(weights[0], rows, mean, "mean");
  check_statistics(weights[0], rows, sigma, "sigma");
  const Formula kind = parse(formula);
  const at::ScalarType from = weights[0].scalar_type(), to = out[0].scalar_type();
  if (from == at::kFloat && to == at::kBFloat16) {
    standardize_rows<float, c10::BFloat16>(weights, out, mean, sigma, eps, kind);
  } else if (from == at::kFloat && to == at::kHalf) {
    standardize_rows<float, c10::Half>(weights, out, mean, sigma, eps, kind);
  } else if (from == to) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from, "standardize_all", [&] {
      standardize_rows<scalar_t, scalar_t>(weights, out, mean, sigma, eps, kind);
    });
  } else {
    std::vector<Tensor> wide, exact;  // rounded once
    for (const Tensor& weight : weights) {
      wide.push_back(weight.to(statistics_of(weight)));
      exact.push_back(at::empty_like(wide.back()));
    }
    standardize_all(wide, eps, formula, exact, mean, sigma);
    for (size_t k = 0; k < out.size(); ++k) out[k].copy_(exact[k]);
  }
}

// `out` may be `grads`: a row is summed before it is written, value by value.
void standardize_all_backward(TensorList grads, TensorList weights, at::IntArrayRef offsets,
                              const Tensor& mean, const Tensor& sigma, double eps,
                              std::string_view formula, TensorList out) {
  check_weights(weights);
  check_like(weights, grads, "grads");
  check_like(weights, out, "out");
  TORCH_CHECK(grads[0].scalar_type() == weights[0].scalar_type() &&
                  out[0].scalar_type() == weights[0].scalar_type(),
              "grads and out must have the dtype of the weights");
  TORCH_CHECK(offsets.size() == weights.size(), "expected an offset for each weight");
  for (size_t k = 0; k < weights.size(); ++k) {
    TORCH_CHECK(offsets[k] >= 0, "offsets must not be negative");
    check_statistics(weights[0], offsets[k] + weights[k].size(0), mean, "mean");
    check_statistics(weights[0], offsets[k] + weights[k].size(0), sigma, "sigma");
  }
  const Formula kind = parse(formula);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, weights[0].scalar_type(), "standardize_all_backward", [&] {
        using A = Accumulate<scalar_t>;
        std::vector<const scalar_t*> of, from;
        std::vector<scalar_t*> to;
        for (size_t k = 0; k < weights.size(); ++k) {
          to.push_back(out[k].mutable_data_ptr<scalar_t>());
          of.push_back(grads[k].const_data_ptr<scalar_t>());
          from.push_back(weights[k].const_data_ptr<scalar_t>());
        }
        const A *means = mean.const_data_ptr<A>(), *sigmas = sigma.const_data_ptr<A>();
        over_rows(weights, [&](size_t k, int64_t i, int64_t n) {
          const scalar_t *g = of[k] + i * n, *w = from[k] + i * n;
          const int64_t at = offsets[k] + i;
          double sum_g, sum_gw;
          rows_dots(g, w, 1, n, &means[at], &sum_g, &sum_gw);
          const double s = sigmas[at], d = kind == Formula::std_eps ? s + eps : s;
          // What the mean lost when it was rounded; where it is small, nothing that can be seen.
          double rest = 0;
          if (std::abs(means[at]) > kLargeMean * s) {
            double centre, variance;
            rows_moments(w, 1, n, &centre, &variance);
            rest = centre - means[at];
          }
          const double freedom = kind == Formula::paper ? n : n - 1;
          const double scale = s > 0 ? 1 / (freedom * s * d * d) : 0;
          const A of_g = static_cast<A>(1 / d);
          const A of_w = static_cast<A>(-scale * (sum_gw - rest * sum_g));
          const A offset = static_cast<A>(-sum_g / (n * d) - of_w * rest);
          scalar_t* const dw = to[k] + i * n;
          write_row(n, i + 1 == weights[k].size(0), {g, w}, [&](int64_t first, int64_t count) {
            rows_gradient(g + first, w + first, dw + first, 1, count, &means[at], &of_g, &of_w,
                          &offset);
          });
        });
      });
}

std::tuple<Tensor, Tensor, Tensor> standardize(const Tensor& weight, double eps,
                                               std::string_view formula, at::ScalarType dtype) {
  check_weights(weight);
  Tensor w_hat = at::empty_like(weight, weight.options().dtype(dtype));
  Tensor mean = at::empty({weight.size(0)}, weight.options().dtype(statistics_of(weight)));
  Tensor sigma = at::empty_like(mean);
  standardize_all(weight, eps, formula, w_hat, mean, sigma);
  return {w_hat, mean, sigma};
}

Tensor standardize_backward(const Tensor& grad, const Tensor& weight, const Tensor& mean,
                            const Tensor& sigma, double eps, std::string_view formula) {
  Tensor dw = at::empty_like(weight);
  const bool fits =
      grad.scalar_type() == weight.scalar_type() && grad.strides() == weight.strides();
  if (!fits) dw.copy_(grad);
  standardize_all_backward(fits ? grad : dw, weight, {0}, mean, sigma, eps, formula, dw);
  return dw;
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CPU, library) {
  library.impl("standardize", standardize);
  library.impl("standardize_backward", standardize_backward);
  library.impl("standardize_all", standardize_all);
  library.impl("standardize_all_backward", standardize_all_backward);
}

}  // namespace
}  // namespace wsbcn
