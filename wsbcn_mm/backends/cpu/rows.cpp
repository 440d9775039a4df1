#include "rows.h"

#include <algorithm>
#include <cmath>

#include "clones.h"
#include "lanes.h"

namespace wsbcn {
namespace {

// A chunk of a long row stays in the first-level cache between two passes over it.
constexpr int64_t kChunk = 2048;
// In longer rows the sum of a register is a small part of the work.
constexpr int64_t kShort = 256;

// ------------------------------------------------------------------------------------------------
// What is computed, the same for rows and columns. V: a number, or a register of them.

template <typename V, typename A>
WSBCN_INLINE
V affine(const V& x, A m, A scale, A shift) {
  return (x - m) * scale + shift;
}

template <typename V, typename A>
WSBCN_INLINE
V gradient(const V& g, const V& x, A m, A p, A q, A r) {
  return p * g + q * (x - m) + r;
}

template <typename V, typename Keep, typename Sum>
WSBCN_INLINE
void add_value(const V& x, Keep keep, Sum* sum) {
  *sum += keep ? x : V{};
}

// The deviation, which it returns, and its square.
template <typename V, typename A, typename Keep, typename Sum>
WSBCN_INLINE
V add_square(const V& x, A centre, Keep keep, Sum* square) {
  const V d = keep ? x - centre : V{};
  *square += d * d;
  return d;
}

template <typename V, typename A, typename Keep, typename Sum>
WSBCN_INLINE
void add_dots(const V& g, const V& x, A m, Keep keep, Sum* sum_g, Sum* sum_gx) {
  const V kept = keep ? g : V{};
  *sum_g += kept;
  *sum_gx += kept * (x - m);
}

// ------------------------------------------------------------------------------------------------
// Two ways through memory. of(k) gives the function of channel k: of_channel(width, i).

// Rows: the channel changes slowly. What is written may replace what is read.
template <typename A, int bytes, typename U, typename Of>
WSBCN_INLINE
void write_rows(U* y, int64_t rows, int64_t length, const Of& of) {
  constexpr int64_t lanes = bytes / sizeof(A);
  for (int64_t k = 0; k < rows; ++k) {
    const auto of_row = of(k);
    const int64_t first = k * length, end = first + length;
    if (length < lanes) {
      for (int64_t i = first; i < end; ++i) store(Width<A>(), of_row(Width<A>(), i), y + i);
      continue;
    }
    constexpr Width<Lanes<A, bytes>> width;
    // The last values: read before those that they overlap are written.
    const Lanes<A, bytes> last = of_row(width, end - lanes);
    for (int64_t i = first; i < end - lanes; i += lanes) store(width, of_row(width, i), y + i);
    store(width, last, y + end - lanes);
  }
}

// Columns: the channel changes with every value.
template <typename A, typename Do>
WSBCN_INLINE
void over_columns(int64_t length, int64_t channels, const Do& act) {
  for (int64_t i = 0; i < length; ++i) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) act(Width<A>(), i * channels + c, c);
  }
}

template <typename A, typename U, typename Of>
WSBCN_INLINE
void write_columns(U* y, int64_t length, int64_t channels, const Of& of) {
  over_columns<A>(length, channels, [&](auto width, int64_t i, int64_t c) WSBCN_INLINED {
    store(width, of(c)(width, i), y + i);
  });
}

// Whether the sums of rows are worth to be taken side by side: of several short ones.
template <typename A, int bytes>
WSBCN_INLINE
bool are_short(int64_t rows, int64_t length) {
  return rows > 2 && length >= static_cast<int64_t>(bytes / sizeof(A)) && length <= kShort;
}

// Calls act(width) with the widest registers, in bytes, that a row fills; 16 where it fills none.
template <typename A, int bytes, typename Act>
WSBCN_INLINE
void with_width(int64_t length, const Act& act) {
  if constexpr (bytes > 16) {
    if (length < static_cast<int64_t>(bytes / sizeof(A))) {
      with_width<A, bytes / 2>(length, act);
      return;
    }
  }
  act(std::integral_constant<int, bytes>());
}

// ------------------------------------------------------------------------------------------------
// Moments

// A number near the mean of the row, from the values that it begins with.
template <typename T, typename A, int bytes>
WSBCN_INLINE
A guess_of(const T* x, int64_t length) {
  constexpr int64_t lanes = bytes / sizeof(A);
  if (length < lanes) return static_cast<A>(x[0]);
  return sum_of<A, bytes>(load(Width<Lanes<A, bytes>>(), x)) / lanes;
}

template <typename T, typename A, int bytes>
WSBCN_INLINE
void moments_of_row(const T* x, int64_t length, double inverse, double* mean, double* variance) {
  double total_mean = 0, total_squares = 0;
  A centre = guess_of<T, A, bytes>(x, length);
  for (int64_t start = 0; start < length; start += kChunk) {
    const int64_t end = std::min(start + kChunk, length), count = end - start;
    const double share = count == length ? inverse : 1.0 / count;
    // Deviations from `centre`, which is not quite the mean: what is left over corrects both
    // moments. Again where it was more than a standard deviation away, for that costs digits.
    double left, squares;
    const auto pass = [&]() WSBCN_INLINED {
      double sums[2];
      sums_over<A, bytes, 2>(
          start, end,
          [&](auto width, int64_t i, auto keep, auto* to)
              WSBCN_INLINED { to[0] += add_square(load(width, x + i), centre, keep, to + 1); },
          sums);
      left = sums[0] * share;
      squares = sums[1] - sums[0] * left;
    };
    pass();
    if (!(left * left <= squares * share)) {
      centre = static_cast<A>(centre + left);
      pass();
    }
    // Chan et al.: moments of the union of what was seen and this chunk.
    const double exact = static_cast<double>(centre) + left;
    if (count == length) {
      total_mean = exact;
      total_squares = squares;
      break;
    }
    const double delta = exact - total_mean;
    const double part = static_cast<double>(count) / end;
    total_mean += delta * part;
    total_squares += squares + delta * delta * part * start;
    centre = static_cast<A>(total_mean);
  }
  *mean = total_mean;
  *variance = std::max(total_squares * inverse, 0.0);
}

// The same for up to kBlock short rows side by side: around their means.
template <typename T, typename A, int bytes>
WSBCN_INLINE
void moments_of_block(const T* x, int64_t rows, int64_t length, double inverse, double* mean,
                      double* variance) {
  A total[kBlock], centre[kBlock], sums[2 * kBlock];
  // A block that is not full sees its last row again.
  const auto start = [=](int64_t k) WSBCN_INLINED { return x + std::min(k, rows - 1) * length; };
  sums_over_block<A, bytes, 1>(
      length,
      [&](int64_t k, auto width, int64_t i, auto keep, auto* to)
          WSBCN_INLINED { add_value(load(width, start(k) + i), keep, to); },
      total);
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) centre[k] = total[k] * static_cast<A>(inverse);
  sums_over_block<A, bytes, 2>(
      length,
      [&](int64_t k, auto width, int64_t i, auto keep, auto* to) WSBCN_INLINED {
        to[0] += add_square(load(width, start(k) + i), centre[k], keep, to + 1);
      },
      sums);
  double means[kBlock], variances[kBlock];
#pragma omp simd
  for (int k = 0; k < kBlock; ++k) {
    const double left = sums[k] * inverse;
    means[k] = static_cast<double>(centre[k]) + left;
    const double squares = (sums[kBlock + k] - sums[k] * left) * inverse;
    variances[k] = squares < 0 ? 0 : squares;
  }
  std::copy_n(means, rows, mean);
  std::copy_n(variances, rows, variance);
}

template <typename T, typename A, int bytes>
WSBCN_INLINE
void moments_of_rows(const T* x, int64_t rows, int64_t length, double* mean, double* variance) {
  const double inverse = 1.0 / length;
  if (are_short<A, bytes>(rows, length)) {
    for (int64_t k = 0; k < rows; k += kBlock) {
      const int64_t count = std::min<int64_t>(kBlock, rows - k);
      moments_of_block<T, A, bytes>(x + k * length, count, length, inverse, mean + k, variance + k);
    }
    return;
  }
  for (int64_t k = 0; k < rows; ++k) {
    moments_of_row<T, A, bytes>(x + k * length, length, inverse, mean + k, variance + k);
  }
}

template <typename T, typename A>
WSBCN_INLINE
void moments_of_columns(const T* x, int64_t length, int64_t channels, A* mean, A* squares) {
  std::fill_n(mean, channels, A(0));
  std::fill_n(squares, channels, A(0));
  // Around the first values: sums of the values themselves lose digits where they lie far from 0.
  over_columns<A>(length, channels, [&](auto width, int64_t i, int64_t c) WSBCN_INLINED {
    add_value(load(width, x + i) - load(width, x + c), true, mean + c);
  });
  const A inverse = A(1) / static_cast<A>(length);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) mean[c] = load(Width<A>(), x + c) + mean[c] * inverse;
  over_columns<A>(length, channels, [&](auto width, int64_t i, int64_t c) WSBCN_INLINED {
    add_square(load(width, x + i), mean[c], true, squares + c);
  });
}

// ------------------------------------------------------------------------------------------------
// Sums with the gradient

template <typename T, typename A, int bytes>
WSBCN_INLINE
void dots_of_rows(const T* g, const T* x, int64_t rows, int64_t length, const A* m, double* sum_g,
                  double* sum_gx) {
  int64_t k = 0;
  for (; are_short<A, bytes>(rows, length) && k < rows; k += kBlock) {
    A sums[2 * kBlock];
    const int64_t count = std::min<int64_t>(kBlock, rows - k);
    const auto row = [=](int64_t j) WSBCN_INLINED { return k + std::min(j, count - 1); };
    sums_over_block<A, bytes, 2>(
        length,
        [&](int64_t j, auto width, int64_t i, auto keep, auto* to) WSBCN_INLINED {
          const int64_t at = row(j) * length + i;
          add_dots(load(width, g + at), load(width, x + at), m[row(j)], keep, to, to + 1);
        },
        sums);
    std::copy_n(sums, count, sum_g + k);
    std::copy_n(sums + kBlock, count, sum_gx + k);
  }
  for (x += k * length, g += k * length; k < rows; ++k, x += length, g += length) {
    const A centre = m[k];
    double total[2] = {0, 0};
    for (int64_t start = 0; start < length; start += kChunk) {
      double sums[2];
      sums_over<A, bytes, 2>(
          start, std::min(start + kChunk, length),
          [&](auto width, int64_t i, auto keep, auto* to) WSBCN_INLINED {
            add_dots(load(width, g + i), load(width, x + i), centre, keep, to, to + 1);
          },
          sums);
      total[0] += sums[0];
      total[1] += sums[1];
    }
    sum_g[k] = total[0];
    sum_gx[k] = total[1];
  }
}

template <typename T, typename A>
WSBCN_INLINE
void dots_of_columns(const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g,
                     A* sum_gx) {
  std::fill_n(sum_g, channels, A(0));
  std::fill_n(sum_gx, channels, A(0));
  over_columns<A>(length, channels, [&](auto width, int64_t i, int64_t c) WSBCN_INLINED {
    add_dots(load(width, g + i), load(width, x + i), m[c], true, sum_g + c, sum_gx + c);
  });
}

// ------------------------------------------------------------------------------------------------
// Results and gradients

template <typename T, typename A>
WSBCN_INLINE
auto affine_of(const T* x, const A* m, const A* scale, const A* shift) {
  return [=](int64_t k) WSBCN_INLINED {
    return [x, m = m[k], scale = scale[k], shift = shift[k]](auto width, int64_t i)
               WSBCN_INLINED { return affine(load(width, x + i), m, scale, shift); };
  };
}

template <typename T, typename A>
WSBCN_INLINE
auto gradient_of(const T* g, const T* x, const A* m, const A* p, const A* q, const A* r) {
  return [=](int64_t k) WSBCN_INLINED {
    return [g, x, m = m[k], p = p[k], q = q[k], r = r[k]](auto width, int64_t i) WSBCN_INLINED {
      return gradient(load(width, g + i), load(width, x + i), m, p, q, r);
    };
  };
}

}  // namespace

// Of each function one version per width of registers; the loader picks the widest that the machine
// has. They are not templates: a version needs a function of its own. Only a caller that sees all
// versions has the choice, another file would get the first one: what rows.h declares calls them.
namespace versions {
#define WSBCN_BYTES(VERSION, bytes, ...) \
  VERSION                                \
  int64_t register_bytes() {             \
    return bytes;                        \
  }
WSBCN_VERSIONS(WSBCN_BYTES)

#define WSBCN_ROWS_OF(VERSION, bytes, T, A)                                                     \
  VERSION                                                                                       \
  void moments(const T* x, int64_t rows, int64_t length, double* mean, double* variance) {      \
    with_width<A, bytes>(length, [&](auto width) WSBCN_INLINED {                                \
      moments_of_rows<T, A, width()>(x, rows, length, mean, variance);                          \
    });                                                                                         \
  }                                                                                             \
  VERSION                                                                                       \
  void dots(const T* g, const T* x, int64_t rows, int64_t length, const A* m, double* sum_g,    \
            double* sum_gx) {                                                                   \
    with_width<A, bytes>(length, [&](auto width) WSBCN_INLINED {                                \
      dots_of_rows<T, A, width()>(g, x, rows, length, m, sum_g, sum_gx);                        \
    });                                                                                         \
  }                                                                                             \
  VERSION                                                                                       \
  void gradient(const T* g, const T* x, T* dx, int64_t rows, int64_t length, const A* m,        \
                const A* p, const A* q, const A* r) {                                           \
    with_width<A, bytes>(length, [&](auto width) WSBCN_INLINED {                                \
      write_rows<A, width()>(dx, rows, length, gradient_of(g, x, m, p, q, r));                  \
    });                                                                                         \
  }
#define WSBCN_ROWS_AFFINE(VERSION, bytes, T, U, A)                                             \
  VERSION                                                                                      \
  void affine(const T* x, U* y, int64_t rows, int64_t length, const A* m, const A* scale,      \
              const A* shift) {                                                                \
    with_width<A, bytes>(length, [&](auto width) WSBCN_INLINED {                               \
      write_rows<A, width()>(y, rows, length, affine_of(x, m, scale, shift));                  \
    });                                                                                        \
  }
#define WSBCN_DEFINE(T, A)            \
  WSBCN_VERSIONS(WSBCN_ROWS_OF, T, A) \
  WSBCN_VERSIONS(WSBCN_ROWS_AFFINE, T, T, A)

WSBCN_DEFINE(double, double)
WSBCN_DEFINE(float, float)
WSBCN_DEFINE(c10::BFloat16, float)
WSBCN_DEFINE(c10::Half, float)
WSBCN_VERSIONS(WSBCN_ROWS_AFFINE, float, c10::BFloat16, float)
WSBCN_VERSIONS(WSBCN_ROWS_AFFINE, float, c10::Half, float)
#undef WSBCN_DEFINE
}  // namespace versions

int64_t register_bytes() {
  return versions::register_bytes();
}

#define WSBCN_CALL_AFFINE(T, U, A)                                                             \
  void rows_affine(const T* x, U* y, int64_t rows, int64_t length, const A* m, const A* scale, \
                   const A* shift) {                                                           \
    versions::affine(x, y, rows, length, m, scale, shift);                                     \
  }
#define WSBCN_CALL_ROWS(T, A)                                                                     \
  void rows_moments(const T* x, int64_t rows, int64_t length, double* mean, double* variance) {   \
    versions::moments(x, rows, length, mean, variance);                                           \
  }                                                                                               \
  void rows_dots(const T* g, const T* x, int64_t rows, int64_t length, const A* m, double* sum_g, \
                 double* sum_gx) {                                                                \
    versions::dots(g, x, rows, length, m, sum_g, sum_gx);                                         \
  }                                                                                               \
  void rows_gradient(const T* g, const T* x, T* dx, int64_t rows, int64_t length, const A* m,     \
                     const A* p, const A* q, const A* r) {                                        \
    versions::gradient(g, x, dx, rows, length, m, p, q, r);                                       \
  }
#define WSBCN_COLUMNS_OF(T, A)                                                                     \
  WSBCN_CLONES                                                                                     \
  void column_moments(const T* x, int64_t length, int64_t channels, A* mean, A* squares) {         \
    moments_of_columns<T, A>(x, length, channels, mean, squares);                                  \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_affine(const T* x, T* y, int64_t length, int64_t channels, const A* m,               \
                     const A* scale, const A* shift) {                                             \
    write_columns<A>(y, length, channels, affine_of(x, m, scale, shift));                          \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_dots(const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g, \
                   A* sum_gx) {                                                                    \
    dots_of_columns<T, A>(g, x, length, channels, m, sum_g, sum_gx);                               \
  }                                                                                                \
  WSBCN_CLONES                                                                                     \
  void column_gradient(const T* g, const T* x, T* dx, int64_t length, int64_t channels,            \
                       const A* m, const A* p, const A* q, const A* r) {                           \
    write_columns<A>(dx, length, channels, gradient_of(g, x, m, p, q, r));                         \
  }
#define WSBCN_DEFINE(T, A)   \
  WSBCN_CALL_ROWS(T, A)      \
  WSBCN_CALL_AFFINE(T, T, A) \
  WSBCN_COLUMNS_OF(T, A)

WSBCN_DEFINE(double, double)
WSBCN_DEFINE(float, float)
WSBCN_DEFINE(c10::BFloat16, float)
WSBCN_DEFINE(c10::Half, float)
WSBCN_CALL_AFFINE(float, c10::BFloat16, float)
WSBCN_CALL_AFFINE(float, c10::Half, float)

}  // namespace wsbcn
