#include "rows.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "clones.h"

namespace wsbcn {

// A chunk of a long row stays in the first-level cache between two passes over it.
constexpr int64_t kChunk = 2048;

// Sums are kept in the lanes of registers. A row shorter than kShortRow uses one register; a longer
// one uses four, joined in double: they add side by side, and a lane of single precision sees few
// values, so that its rounding stays small.
constexpr int64_t kLanes = 16;
constexpr int64_t kRegisters = 4;
constexpr int64_t kShortRow = 4 * kRegisters * kLanes;

// One register of values: the compiler splits it where a machine's are narrower.
template <typename A>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Values __attribute__((vector_size(kLanes * sizeof(float))));
  typedef int32_t Mask __attribute__((vector_size(kLanes * sizeof(int32_t))));
};
template <>
struct LanesOf<double> {
  typedef double Values __attribute__((vector_size(kLanes * sizeof(double))));
  typedef int64_t Mask __attribute__((vector_size(kLanes * sizeof(int64_t))));
};
template <typename A>
using Lanes = typename LanesOf<A>::Values;

template <typename A, typename T>
WSBCN_INLINE
Lanes<A> load(const T* x) {
  Lanes<A> lanes;
  if constexpr (std::is_same_v<A, T>) {
    __builtin_memcpy(&lanes, x, sizeof(lanes));
  } else {
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = static_cast<A>(x[j]);
  }
  return lanes;
}

template <typename A, typename T>
WSBCN_INLINE
void store(Lanes<A> lanes, T* y) {
  if constexpr (std::is_same_v<A, T>) {
    __builtin_memcpy(y, &lanes, sizeof(lanes));
  } else {
    for (int64_t j = 0; j < kLanes; ++j) y[j] = static_cast<T>(lanes[j]);
  }
}

template <typename A>
WSBCN_INLINE
A sum_of(Lanes<A> v) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  const auto by_8 = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                    __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const auto by_4 = __builtin_shufflevector(by_8, by_8, 0, 1, 2, 3) +
                    __builtin_shufflevector(by_8, by_8, 4, 5, 6, 7);
  return (by_4[0] + by_4[2]) + (by_4[1] + by_4[3]);
#endif
#endif
  A sum = 0;
  for (int64_t j = 0; j < kLanes; ++j) sum += v[j];
  return sum;
}

// The four registers of a sum as one number.
template <typename A>
WSBCN_INLINE
double joined(const Lanes<A>* registers) {
  const auto wide = [&](int64_t k) WSBCN_INLINED {
    return __builtin_convertvector(registers[k], Lanes<double>);
  };
  return sum_of<double>((wide(0) + wide(1)) + (wide(2) + wide(3)));
}

// Calls take(i, keep) for kLanes values from i on, until each i in [first, count) was kept once:
// the last turn takes the last values before `count`, and keeps those not seen. For count >=
// kLanes.
template <typename A, typename Take>
WSBCN_INLINE
void in_turns(int64_t first, int64_t count, const Take& take) {
  typename LanesOf<A>::Mask lane;
  for (int64_t j = 0; j < kLanes; ++j) lane[j] = j;
  int64_t i = first;
  for (; i + kLanes <= count; i += kLanes) take(i, lane >= 0);
  if (i < count) take(count - kLanes, lane >= static_cast<int>(i - (count - kLanes)));
}

// The same for a chunk [first, end) of a long row, with the register k that shall be used.
template <typename A, typename Take>
WSBCN_INLINE
void in_registers(int64_t first, int64_t end, const Take& take) {
  typename LanesOf<A>::Mask lane;
  for (int64_t j = 0; j < kLanes; ++j) lane[j] = j;
  int64_t i = first;
  for (; i + kRegisters * kLanes <= end; i += kRegisters * kLanes) {
    take(0, i, lane >= 0);
    take(1, i + kLanes, lane >= 0);
    take(2, i + 2 * kLanes, lane >= 0);
    take(3, i + 3 * kLanes, lane >= 0);
  }
  in_turns<A>(i, end, [&](int64_t from, auto keep) WSBCN_INLINED { take(0, from, keep); });
}

template <typename T, typename A>
WSBCN_INLINE
void moments_of_short_row(const T* x, int64_t length, double inverse, double* mean,
                          double* variance) {
  if (length < kLanes) {
    double sum = 0, square = 0;
    for (int64_t i = 0; i < length; ++i) sum += static_cast<A>(x[i]);
    *mean = sum * inverse;
    for (int64_t i = 0; i < length; ++i) {
      square += (static_cast<A>(x[i]) - *mean) * (static_cast<A>(x[i]) - *mean);
    }
    *variance = square * inverse;
    return;
  }
  const Lanes<A> zero = {};
  Lanes<A> sum = {}, rest = {}, square = {};
  in_turns<A>(0, length,
              [&](int64_t i, auto keep) WSBCN_INLINED { sum += keep ? load<A>(x + i) : zero; });
  // Rounded: what is left over corrects both moments.
  const A centre = static_cast<A>(sum_of<A>(sum) * inverse);
  in_turns<A>(0, length, [&](int64_t i, auto keep) WSBCN_INLINED {
    const Lanes<A> d = keep ? load<A>(x + i) - centre : zero;
    rest += d;
    square += d * d;
  });
  const double left = sum_of<A>(rest) * inverse;
  *mean = static_cast<double>(centre) + left;
  *variance = std::max(sum_of<A>(square) * inverse - left * left, 0.0);
}

template <typename T, typename A>
WSBCN_INLINE
void moments_of_long_row(const T* x, int64_t length, double* mean, double* variance) {
  const Lanes<A> zero = {};
  double total_mean = 0, total_squares = 0;
  for (int64_t start = 0; start < length; start += kChunk) {
    const int64_t end = std::min(start + kChunk, length), count = end - start;
    Lanes<A> sum[kRegisters] = {}, rest[kRegisters] = {}, square[kRegisters] = {};
    in_registers<A>(start, end, [&](int64_t k, int64_t i, auto keep) WSBCN_INLINED {
      sum[k] += keep ? load<A>(x + i) : zero;
    });
    // Rounded, as above.
    const A centre = static_cast<A>(joined<A>(sum) / count);
    in_registers<A>(start, end, [&](int64_t k, int64_t i, auto keep) WSBCN_INLINED {
      const Lanes<A> d = keep ? load<A>(x + i) - centre : zero;
      rest[k] += d;
      square[k] += d * d;
    });
    const double left = joined<A>(rest);
    const double exact = static_cast<double>(centre) + left / count;
    const double around = joined<A>(square) - left * left / count;
    // Chan et al.: moments of the union of what was seen and this chunk.
    const double delta = exact - total_mean;
    const double share = static_cast<double>(count) / end;
    total_mean += delta * share;
    total_squares += around + delta * delta * share * start;
  }
  *mean = total_mean;
  *variance = std::max(total_squares / length, 0.0);
}

template <typename T, typename A>
WSBCN_INLINE
void moments_of_rows(const T* x, int64_t rows, int64_t length, double* mean, double* variance) {
  const double inverse = 1.0 / length;
  for (int64_t k = 0; k < rows; ++k) {
    if (length < kShortRow) {
      moments_of_short_row<T, A>(x + k * length, length, inverse, mean + k, variance + k);
    } else {
      moments_of_long_row<T, A>(x + k * length, length, mean + k, variance + k);
    }
  }
}

template <typename T, typename U, typename A>
WSBCN_INLINE
void affine_of_rows(const T* x, U* y, int64_t rows, int64_t length, const A* m, const A* scale,
                    const A* shift) {
  for (int64_t k = 0; k < rows; ++k, x += length, y += length) {
    const A centre = m[k], slope = scale[k], offset = shift[k];
    if (length >= kLanes && length < kShortRow) {
      in_turns<A>(0, length, [&](int64_t i, auto) WSBCN_INLINED {
        store<A>((load<A>(x + i) - centre) * slope + offset, y + i);
      });
      continue;
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      y[i] = static_cast<U>((static_cast<A>(x[i]) - centre) * slope + offset);
    }
  }
}

template <typename T, typename A>
WSBCN_INLINE
void dots_of_rows(const T* g, const T* x, int64_t rows, int64_t length, const A* m, double* sum_g,
                  double* sum_gx) {
  for (int64_t k = 0; k < rows; ++k, x += length, g += length) {
    const A centre = m[k];
    double total_g = 0, total_gx = 0;
    if (length < kLanes) {
      for (int64_t i = 0; i < length; ++i) {
        total_g += static_cast<A>(g[i]);
        total_gx += static_cast<A>(g[i]) * (static_cast<A>(x[i]) - centre);
      }
    } else if (length < kShortRow) {
      const Lanes<A> zero = {};
      Lanes<A> part_g = {}, part_gx = {};
      in_turns<A>(0, length, [&](int64_t i, auto keep) WSBCN_INLINED {
        const Lanes<A> gi = keep ? load<A>(g + i) : zero;
        part_g += gi;
        part_gx += gi * (load<A>(x + i) - centre);
      });
      total_g = sum_of<double>(__builtin_convertvector(part_g, Lanes<double>));
      total_gx = sum_of<double>(__builtin_convertvector(part_gx, Lanes<double>));
    } else {
      const Lanes<A> zero = {};
      for (int64_t start = 0; start < length; start += kChunk) {
        Lanes<A> part_g[kRegisters] = {}, part_gx[kRegisters] = {};
        in_registers<A>(start, std::min(start + kChunk, length),
                        [&](int64_t j, int64_t i, auto keep) WSBCN_INLINED {
                          const Lanes<A> gi = keep ? load<A>(g + i) : zero;
                          part_g[j] += gi;
                          part_gx[j] += gi * (load<A>(x + i) - centre);
                        });
        total_g += joined<A>(part_g);
        total_gx += joined<A>(part_gx);
      }
    }
    sum_g[k] = total_g;
    sum_gx[k] = total_gx;
  }
}

template <typename T, typename A>
WSBCN_INLINE
void gradient_of_rows(const T* g, const T* x, T* dx, int64_t rows, int64_t length, const A* m,
                      const A* p, const A* q, const A* r) {
  for (int64_t k = 0; k < rows; ++k, x += length, g += length, dx += length) {
    const A centre = m[k], of_g = p[k], of_x = q[k], offset = r[k];
    if (length >= kLanes && length < kShortRow) {
      // The last values are read first: they overlap those before, and dx may be g.
      const int64_t last = length - kLanes;
      const Lanes<A> last_g = load<A>(g + last);
      for (int64_t i = 0; i < last; i += kLanes) {
        store<A>(of_g * load<A>(g + i) + of_x * (load<A>(x + i) - centre) + offset, dx + i);
      }
      store<A>(of_g * last_g + of_x * (load<A>(x + last) - centre) + offset, dx + last);
      continue;
    }
#pragma omp simd
    for (int64_t i = 0; i < length; ++i) {
      dx[i] = static_cast<T>(of_g * static_cast<A>(g[i]) + of_x * (static_cast<A>(x[i]) - centre) +
                             offset);
    }
  }
}

template <typename T, typename A>
WSBCN_INLINE
void moments_of_columns(const T* x, int64_t length, int64_t channels, A* mean, A* squares) {
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
WSBCN_INLINE
void affine_of_columns(const T* x, T* y, int64_t length, int64_t channels, const A* m,
                       const A* scale, const A* shift) {
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
WSBCN_INLINE
void dots_of_columns(const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g,
                     A* sum_gx) {
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
WSBCN_INLINE
void gradient_of_columns(const T* g, const T* x, T* dx, int64_t length, int64_t channels,
                         const A* m, const A* p, const A* q, const A* r) {
  for (int64_t i = 0; i < length; ++i) {
    const T* row = x + i * channels;
    const T* grad = g + i * channels;
    T* out = dx + i * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = static_cast<T>(p[c] * static_cast<A>(grad[c]) +
                              q[c] * (static_cast<A>(row[c]) - m[c]) + r[c]);
    }
  }
}

// Not templates themselves: a clone needs a function of its own.
#define WSBCN_DEFINE(T, A)                                                                         \
  WSBCN_CLONES                                                                                     \
  void rows_moments(const T* x, int64_t rows, int64_t length, double* mean, double* variance) {    \
    moments_of_rows<T, A>(x, rows, length, mean, variance);                                        \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void rows_affine(const T* x, T* y, int64_t rows, int64_t length, const A* m, const A* scale,     \
                   const A* shift) {                                                               \
    affine_of_rows(x, y, rows, length, m, scale, shift);                                           \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void rows_dots(const T* g, const T* x, int64_t rows, int64_t length, const A* m, double* sum_g,  \
                 double* sum_gx) {                                                                 \
    dots_of_rows<T, A>(g, x, rows, length, m, sum_g, sum_gx);                                      \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void rows_gradient(const T* g, const T* x, T* dx, int64_t rows, int64_t length, const A* m,      \
                     const A* p, const A* q, const A* r) {                                         \
    gradient_of_rows<T, A>(g, x, dx, rows, length, m, p, q, r);                                    \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_moments(const T* x, int64_t length, int64_t channels, A* mean, A* squares) {         \
    moments_of_columns<T, A>(x, length, channels, mean, squares);                                  \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_affine(const T* x, T* y, int64_t length, int64_t channels, const A* m,               \
                     const A* scale, const A* shift) {                                             \
    affine_of_columns<T, A>(x, y, length, channels, m, scale, shift);                              \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_dots(const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g, \
                   A* sum_gx) {                                                                    \
    dots_of_columns<T, A>(g, x, length, channels, m, sum_g, sum_gx);                               \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_gradient(const T* g, const T* x, T* dx, int64_t length, int64_t channels,            \
                       const A* m, const A* p, const A* q, const A* r) {                           \
    gradient_of_columns<T, A>(g, x, dx, length, channels, m, p, q, r);                             \
  }

WSBCN_DEFINE(double, double)
WSBCN_DEFINE(float, float)
WSBCN_DEFINE(c10::BFloat16, float)
WSBCN_DEFINE(c10::Half, float)

WSBCN_CLONES
void rows_affine(const float* x, c10::BFloat16* y, int64_t rows, int64_t length, const float* m,
                 const float* scale, const float* shift) {
  affine_of_rows(x, y, rows, length, m, scale, shift);
}

WSBCN_CLONES
void rows_affine(const float* x, c10::Half* y, int64_t rows, int64_t length, const float* m,
                 const float* scale, const float* shift) {
  affine_of_rows(x, y, rows, length, m, scale, shift);
}

}  // namespace wsbcn
