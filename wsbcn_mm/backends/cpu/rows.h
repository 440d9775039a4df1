// The loops over memory that everything else is made of, once per dtype.
//
// Two families, one per memory layout of x (N, C, *): `rows` functions see consecutive (sample,
// channel) rows of `length` values each (NCHW); `column` functions see `length` positions of
// `channels` values each (channels_last) and work on all channels at once.
//
// Accumulation is in float, for double in double: within a chunk by SIMD lanes, across chunks in
// double. Chunks depend on the shape alone, so results do not depend on the number of threads.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

namespace wsbcn {

template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Of the machine, as far as the functions below use them.
int64_t register_bytes();

// Every function below exists for these dtypes. WSBCN_ROWS(T, A) declares them for one.
#define WSBCN_ROWS(T, A)                                                                           \
  /* Mean and mean squared deviation from it, in one pass over memory. */                          \
  void rows_moments(const T* x, int64_t rows, int64_t length, double* mean, double* variance);     \
  /* y = (x - m) scale + shift */                                                                  \
  void rows_affine(const T* x, T* y, int64_t rows, int64_t length, const A* m, const A* scale,     \
                   const A* shift);                                                                \
  /* sum(g) and sum(g (x - m)) */                                                                  \
  void rows_dots(const T* g, const T* x, int64_t rows, int64_t length, const A* m, double* sum_g,  \
                 double* sum_gx);                                                                  \
  /* dx = p g + q (x - m) + r; dx may be g */                                                      \
  void rows_gradient(const T* g, const T* x, T* dx, int64_t rows, int64_t length, const A* m,      \
                     const A* p, const A* q, const A* r);                                          \
  /* The same for columns: mean and sum of squared deviations, ... */                              \
  void column_moments(const T* x, int64_t length, int64_t channels, A* mean, A* squares);          \
  void column_affine(const T* x, T* y, int64_t length, int64_t channels, const A* m,               \
                     const A* scale, const A* shift);                                              \
  void column_dots(const T* g, const T* x, int64_t length, int64_t channels, const A* m, A* sum_g, \
                   A* sum_gx);                                                                     \
  void column_gradient(const T* g, const T* x, T* dx, int64_t length, int64_t channels,            \
                       const A* m, const A* p, const A* q, const A* r);

WSBCN_ROWS(double, double)
WSBCN_ROWS(float, float)
WSBCN_ROWS(c10::BFloat16, float)
WSBCN_ROWS(c10::Half, float)
#undef WSBCN_ROWS

// A weight is standardized straight into the dtype of autocast.
void rows_affine(const float* x, c10::BFloat16* y, int64_t rows, int64_t length, const float* m,
                 const float* scale, const float* shift);
void rows_affine(const float* x, c10::Half* y, int64_t rows, int64_t length, const float* m,
                 const float* scale, const float* shift);

}  // namespace wsbcn
