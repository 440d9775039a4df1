#include "rows.h"

#include <algorithm>

// One binary for every x86-64: the loader picks the widest version the machine can run.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define WSBCN_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define WSBCN_CLONES
#endif
// Into the clones, or it would be compiled for the oldest machine only.
#define WSBCN_INLINE static inline __attribute__((always_inline))

namespace wsbcn {

// Sums are kept in this many lanes, joined in double: several registers add side by side, and a lane
// of single precision sees few values, so that its rounding stays as small as torch's own.
constexpr int64_t kLanes = 64;

template <typename A>
WSBCN_INLINE double joined(const A* lanes) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < kLanes; ++j) sum += static_cast<double>(lanes[j]);
  return sum;
}

// Calls add(j, i) for every i in [0, count), lane j = i % kLanes.
template <typename Add>
WSBCN_INLINE void in_lanes(int64_t count, const Add& add) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
#pragma omp simd
    for (int64_t j = 0; j < kLanes; ++j) add(j, i + j);
  }
  for (int64_t j = 0; i + j < count; ++j) add(j, i + j);
}

// A row too short for lanes: its sums are kept in double.
constexpr int64_t kShortRow = 4 * kLanes;

template <typename T, typename A>
WSBCN_INLINE void moments_of_short_row(
    const T* x, int64_t length, double* mean, double* squares) {
  double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < length; ++i) sum += static_cast<double>(static_cast<A>(x[i]));
  const double centre = sum / length;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < length; ++i) {
    const double d = static_cast<double>(static_cast<A>(x[i])) - centre;
    square += d * d;
  }
  *mean = centre;
  *squares = square;
}

template <typename T, typename A>
WSBCN_INLINE void moments_of_row(const T* x, int64_t length, double* mean, double* squares) {
  if (length < kShortRow) return moments_of_short_row<T, A>(x, length, mean, squares);
  double total_mean = 0, total_squares = 0;
  for (int64_t start = 0; start < length; start += kRowChunk) {
    const int64_t count = std::min(kRowChunk, length - start);
    const T* chunk = x + start;
    A sum[kLanes] = {}, rest[kLanes] = {}, square[kLanes] = {};
    in_lanes(count, [&](int64_t j, int64_t i) { sum[j] += static_cast<A>(chunk[i]); });
    // Rounded: what is left over corrects both moments.
    const A centre = static_cast<A>(joined(sum) / count);
    in_lanes(count, [&](int64_t j, int64_t i) {
      const A d = static_cast<A>(chunk[i]) - centre;
      rest[j] += d;
      square[j] += d * d;
    });
    const double left = joined(rest);
    const double exact = static_cast<double>(centre) + left / count;
    const double around = joined(square) - left * left / count;
    // Chan et al.: moments of the union of what was seen and this chunk.
    const double delta = exact - total_mean;
    const double share = static_cast<double>(count) / (start + count);
    total_mean += delta * share;
    total_squares += around + delta * delta * share * start;
  }
  *mean = total_mean;
  *squares = std::max(total_squares, 0.0);
}

template <typename T, typename U, typename A>
WSBCN_INLINE void affine_of_row(const T* x, U* y, int64_t length, A m, A scale, A shift) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    y[i] = static_cast<U>((static_cast<A>(x[i]) - m) * scale + shift);
  }
}

template <typename T, typename A>
WSBCN_INLINE void dots_of_row(
    const T* g, const T* x, int64_t length, A m, double* sum_g, double* sum_gx) {
  double total_g = 0, total_gx = 0;
  if (length < kShortRow) {
#pragma omp simd reduction(+ : total_g, total_gx)
    for (int64_t i = 0; i < length; ++i) {
      const double gi = static_cast<double>(static_cast<A>(g[i]));
      total_g += gi;
      total_gx += gi * static_cast<double>(static_cast<A>(x[i]) - m);
    }
    length = 0;
  }
  for (int64_t start = 0; start < length; start += kRowChunk) {
    const T *grad = g + start, *chunk = x + start;
    A part_g[kLanes] = {}, part_gx[kLanes] = {};
    in_lanes(std::min(kRowChunk, length - start), [&](int64_t j, int64_t i) {
      const A gi = static_cast<A>(grad[i]);
      part_g[j] += gi;
      part_gx[j] += gi * (static_cast<A>(chunk[i]) - m);
    });
    total_g += joined(part_g);
    total_gx += joined(part_gx);
  }
  *sum_g = total_g;
  *sum_gx = total_gx;
}

template <typename T, typename A>
WSBCN_INLINE void gradient_of_row(
    const T* g, const T* x, T* dx, int64_t length, A m, A p, A q, A r) {
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    dx[i] = static_cast<T>(p * static_cast<A>(g[i]) + q * (static_cast<A>(x[i]) - m) + r);
  }
}

template <typename T, typename A>
WSBCN_INLINE void moments_of_columns(
    const T* x, int64_t length, int64_t channels, A* mean, A* squares) {
  std::fill_n(mean, channels, A(0));
  std::fill_n(squares, channels, A(0));
  for (int64_t i = 0; i < length; ++i) {
    const T* row = x + i * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<A>(row[c]);
  }
  const A inverse = A(1) / static_cast<A>(length);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) mean[c] *= inverse;
  for (int64_t i = 0; i < length; ++i) {
    const T* row = x + i * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A d = static_cast<A>(row[c]) - mean[c];
      squares[c] += d * d;
    }
  }
}

template <typename T, typename A>
WSBCN_INLINE void affine_of_columns(
    const T* x, T* y, int64_t length, int64_t channels, const A* m, const A* scale,
    const A* shift) {
  for (int64_t i = 0; i < length; ++i) {
    const T* row = x + i * channels;
    T* out = y + i * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = static_cast<T>((static_cast<A>(row[c]) - m[c]) * scale[c] + shift[c]);
    }
  }
}

template <typename T, typename A>
WSBCN_INLINE void dots_of_columns(
    const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g, A* sum_gx) {
  std::fill_n(sum_g, channels, A(0));
  std::fill_n(sum_gx, channels, A(0));
  for (int64_t i = 0; i < length; ++i) {
    const T* row = x + i * channels;
    const T* grad = g + i * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const A gi = static_cast<A>(grad[c]);
      sum_g[c] += gi;
      sum_gx[c] += gi * (static_cast<A>(row[c]) - m[c]);
    }
  }
}

template <typename T, typename A>
WSBCN_INLINE void gradient_of_columns(
    const T* g, const T* x, T* dx, int64_t length, int64_t channels, const A* m, const A* p,
    const A* q, const A* r) {
  for (int64_t i = 0; i < length; ++i) {
    const T* row = x + i * channels;
    const T* grad = g + i * channels;
    T* out = dx + i * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = static_cast<T>(
          p[c] * static_cast<A>(grad[c]) + q[c] * (static_cast<A>(row[c]) - m[c]) + r[c]);
    }
  }
}

// Not templates themselves: a clone needs a function of its own.
#define WSBCN_DEFINE(T, A)                                                                        \
  WSBCN_CLONES void row_moments(const T* x, int64_t length, double* mean, double* squares) {      \
    moments_of_row<T, A>(x, length, mean, squares);                                               \
  }                                                                                               \
  WSBCN_CLONES void row_affine(const T* x, T* y, int64_t length, A m, A scale, A shift) {         \
    affine_of_row(x, y, length, m, scale, shift);                                           \
  }                                                                                               \
  WSBCN_CLONES void row_dots(                                                                     \
      const T* g, const T* x, int64_t length, A m, double* sum_g, double* sum_gx) {               \
    dots_of_row<T, A>(g, x, length, m, sum_g, sum_gx);                                            \
  }                                                                                               \
  WSBCN_CLONES void row_gradient(                                                                 \
      const T* g, const T* x, T* dx, int64_t length, A m, A p, A q, A r) {                        \
    gradient_of_row<T, A>(g, x, dx, length, m, p, q, r);                                          \
  }                                                                                               \
  WSBCN_CLONES void column_moments(                                                               \
      const T* x, int64_t length, int64_t channels, A* mean, A* squares) {                        \
    moments_of_columns<T, A>(x, length, channels, mean, squares);                                 \
  }                                                                                               \
  WSBCN_CLONES void column_affine(                                                                \
      const T* x, T* y, int64_t length, int64_t channels, const A* m, const A* scale,             \
      const A* shift) {                                                                           \
    affine_of_columns<T, A>(x, y, length, channels, m, scale, shift);                             \
  }                                                                                               \
  WSBCN_CLONES void column_dots(                                                                  \
      const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g,             \
      A* sum_gx) {                                                                                \
    dots_of_columns<T, A>(g, x, length, channels, m, sum_g, sum_gx);                              \
  }                                                                                               \
  WSBCN_CLONES void column_gradient(                                                              \
      const T* g, const T* x, T* dx, int64_t length, int64_t channels, const A* m, const A* p,    \
      const A* q, const A* r) {                                                                   \
    gradient_of_columns<T, A>(g, x, dx, length, channels, m, p, q, r);                            \
  }

WSBCN_DEFINE(double, double)
WSBCN_DEFINE(float, float)
WSBCN_DEFINE(c10::BFloat16, float)
WSBCN_DEFINE(c10::Half, float)

WSBCN_CLONES void row_affine(
    const float* x, c10::BFloat16* y, int64_t length, float m, float scale, float shift) {
  affine_of_row(x, y, length, m, scale, shift);
}

WSBCN_CLONES void row_affine(
    const float* x, c10::Half* y, int64_t length, float m, float scale, float shift) {
  affine_of_row(x, y, length, m, scale, shift);
}

}  // namespace wsbcn
