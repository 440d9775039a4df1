// Registers of values, and how to go through a range of values with them.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "clones.h"

namespace wsbcn {

// As many values of A as fit into `bytes`, the width of a register of the machine.
template <typename A, int bytes>
struct LanesOf {
  typedef A Values __attribute__((vector_size(bytes)));
};
template <typename A, int bytes>
using Lanes = typename LanesOf<A, bytes>::Values;

// Sums are kept in so many registers, which add side by side.
constexpr int kRegisters = 4;

// How many values are worked on at once: V is a number, or Lanes of numbers.
template <typename V>
struct Width {
  using Values = V;
};

// The number that V is, or is made of.
template <typename V, bool = std::is_arithmetic_v<V>>
struct NumberOf {
  using Type = V;
};
template <typename V>
struct NumberOf<V, false> {
  using Type = std::remove_reference_t<decltype(std::declval<V&>()[0])>;
};

// How the bits of `lanes` values lie.
template <int lanes>
struct BitsOf {
  typedef uint16_t Short __attribute__((vector_size(2 * lanes)));
  typedef uint32_t Long __attribute__((vector_size(4 * lanes)));
  typedef int32_t Int __attribute__((vector_size(4 * lanes)));
};

// The compiler makes of c10's conversion of one value after another no conversion of a register.
template <typename T>
constexpr bool kIsShort = std::is_same_v<T, c10::BFloat16> || std::is_same_v<T, c10::Half>;

// bfloat16 is the upper half of a float, rounded to even.
template <typename V>
WSBCN_INLINE
V widened(const c10::BFloat16* x) {
  using Bits = BitsOf<sizeof(V) / sizeof(float)>;
  typename Bits::Short bits;
  __builtin_memcpy(&bits, x, sizeof(bits));
  return (V)(__builtin_convertvector(bits, typename Bits::Long) << 16);
}

template <typename V>
WSBCN_INLINE
void narrow(const V& values, c10::BFloat16* y) {
  using Bits = BitsOf<sizeof(V) / sizeof(float)>;
  const auto bits = (typename Bits::Long)values;
  const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const auto number = (typename Bits::Long)(values == values);  // all ones, or NaN: none
  const auto result =
      __builtin_convertvector((rounded & number) | (0x7fc0 & ~number), typename Bits::Short);
  __builtin_memcpy(y, &result, sizeof(result));
}

// float16 has 5 bits of exponent where a float has 8, and 10 of a mantissa where it has 23. Below
// its smallest normal number it counts steps of 2^-24: as a float does from 0.5 on.
constexpr int32_t kMantissa = 13;
constexpr int32_t kExponent = (127 - 15) << 23;
constexpr int32_t kInfinity = 0x7c00, kNan = 0x7e00;
constexpr int32_t kHalf = 126 << 23;  // 0.5 as a float

template <typename V>
WSBCN_INLINE
V widened(const c10::Half* x) {
  using Bits = BitsOf<sizeof(V) / sizeof(float)>;
  using Int = typename Bits::Int;
  typename Bits::Short shorts;
  __builtin_memcpy(&shorts, x, sizeof(shorts));
  const Int bits = __builtin_convertvector(shorts, Int), size = bits & 0x7fff;
  const Int normal = (size << kMantissa) + kExponent + ((size >= kInfinity) & kExponent);
  const Int small = (Int)((V)(size | kHalf) - 0.5f);
  return (V)((size < (1 << 10) ? small : normal) | ((bits & 0x8000) << 16));
}

template <typename V>
WSBCN_INLINE
void narrow(const V& values, c10::Half* y) {
  using Bits = BitsOf<sizeof(V) / sizeof(float)>;
  using Int = typename Bits::Int;
  const Int bits = (Int)values, size = bits & 0x7fffffff;
  const Int even = (size >> kMantissa) & 1;
  const Int rounded = (size - kExponent + (1 << (kMantissa - 1)) - 1 + even) >> kMantissa;
  const Int normal = rounded < kInfinity ? rounded : Int{} + kInfinity;
  const Int small = (Int)((V)size + 0.5f) - kHalf;
  const Int number = size < kExponent + (1 << 23) ? small : normal;
  const Int result = size > (255 << 23) ? Int{} + kNan : number;
  const auto shorts =
      __builtin_convertvector(result | ((bits >> 16) & 0x8000), typename Bits::Short);
  __builtin_memcpy(y, &shorts, sizeof(shorts));
}

template <typename V, typename T>
WSBCN_INLINE
V load(Width<V>, const T* x) {
  using A = typename NumberOf<V>::Type;
  if constexpr (std::is_arithmetic_v<V>) {
    return static_cast<V>(*x);
  } else if constexpr (kIsShort<T>) {
    return widened<V>(x);
  } else {
    V values;
    if constexpr (std::is_same_v<A, T>) {
      __builtin_memcpy(&values, x, sizeof(values));
    } else {
      for (size_t j = 0; j < sizeof(V) / sizeof(A); ++j) values[j] = static_cast<A>(x[j]);
    }
    return values;
  }
}

template <typename V, typename T>
WSBCN_INLINE
void store(Width<V>, const V& values, T* y) {
  using A = typename NumberOf<V>::Type;
  if constexpr (std::is_arithmetic_v<V>) {
    *y = static_cast<T>(values);
  } else if constexpr (kIsShort<T>) {
    narrow(values, y);
  } else if constexpr (std::is_same_v<A, T>) {
    __builtin_memcpy(y, &values, sizeof(values));
  } else {
    for (size_t j = 0; j < sizeof(V) / sizeof(A); ++j) y[j] = static_cast<T>(values[j]);
  }
}

template <typename A, int bytes>
WSBCN_INLINE
A sum_of(const Lanes<A, bytes>& values) {
  if constexpr (bytes > 16) {
    Lanes<A, bytes / 2> halves[2];
    __builtin_memcpy(halves, &values, sizeof(values));
    return sum_of<A, bytes / 2>(halves[0] + halves[1]);
  } else {
    A sum = values[0];
    for (size_t j = 1; j < bytes / sizeof(A); ++j) sum += values[j];
    return sum;
  }
}

// `count` sums over the values [first, end), in total[]. add(width, i, keep, sums) adds what
// belongs to the values from i on to sums[0], sums[1], ...; values that are not kept count as 0.
template <typename A, int bytes, int count, typename Add>
WSBCN_INLINE
void sums_over(int64_t first, int64_t end, const Add& add, double* total) {
  constexpr int64_t lanes = bytes / sizeof(A);
  for (int k = 0; k < count; ++k) total[k] = 0;
  if (end - first < lanes) {
    for (int64_t i = first; i < end; ++i) add(Width<double>(), i, true, total);
    return;
  }
  constexpr Width<Lanes<A, bytes>> width;
  Lanes<A, bytes> lane;
  for (int64_t j = 0; j < lanes; ++j) lane[j] = static_cast<A>(j);
  const auto all = lane >= 0;
  Lanes<A, bytes> sums[kRegisters][count] = {};
  int64_t i = first;
  for (; i + kRegisters * lanes <= end; i += kRegisters * lanes) {
    add(width, i, all, sums[0]);
    add(width, i + lanes, all, sums[1]);
    add(width, i + 2 * lanes, all, sums[2]);
    add(width, i + 3 * lanes, all, sums[3]);
  }
  for (; i + lanes <= end; i += lanes) add(width, i, all, sums[0]);
  // The last values before `end`, of which those not seen count.
  if (i < end) add(width, end - lanes, lane >= static_cast<A>(i - (end - lanes)), sums[1]);
  for (int k = 0; k < count; ++k) {
    total[k] = sum_of<A, bytes>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
  }
}

// Sums of so many registers side by side cost hardly more than that of one.
constexpr int kBlock = 8;

// a0 + a1, a2 + a3, ..., b0 + b1, ...
template <typename A, int bytes>
WSBCN_INLINE
Lanes<A, bytes> pair_sums(const Lanes<A, bytes>& a, const Lanes<A, bytes>& b) {
  constexpr int lanes = bytes / sizeof(A);
#if defined(__GNUC__) && !defined(__clang__)
  Lanes<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>, bytes> even;
  for (int j = 0; j < lanes; ++j) even[j] = 2 * j;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, even + 1);
#else
  Lanes<A, bytes> sums;
  for (int j = 0; j < lanes / 2; ++j) {
    sums[j] = a[2 * j] + a[2 * j + 1];
    sums[lanes / 2 + j] = b[2 * j] + b[2 * j + 1];
  }
  return sums;
#endif
}

// sums[k]: of the values of registers[k], k < kBlock.
template <typename A, int bytes>
WSBCN_INLINE
void sums_of_block(const Lanes<A, bytes>* registers, A* sums) {
  constexpr int lanes = bytes / sizeof(A);
  if constexpr (lanes > kBlock) {
    Lanes<A, bytes / 2> folded[kBlock];
    for (int k = 0; k < kBlock; ++k) {
      Lanes<A, bytes / 2> halves[2];
      __builtin_memcpy(halves, registers + k, bytes);
      folded[k] = halves[0] + halves[1];
    }
    sums_of_block<A, bytes / 2>(folded, sums);
  } else {
    Lanes<A, bytes> left[kBlock];
    __builtin_memcpy(left, registers, sizeof(left));
    for (int count = kBlock / 2; count * lanes >= kBlock; count /= 2) {
      for (int k = 0; k < count; ++k) left[k] = pair_sums<A, bytes>(left[2 * k], left[2 * k + 1]);
    }
    __builtin_memcpy(sums, left, kBlock * sizeof(A));
  }
}

// As sums_over of kBlock ranges of `length` values each, at least a register of them:
// add(k, width, i, keep, sums) adds what belongs to the values from i on of range k;
// total[j * kBlock + k]: sum j of range k.
template <typename A, int bytes, int count, typename Add>
WSBCN_INLINE
void sums_over_block(int64_t length, const Add& add, A* total) {
  constexpr int64_t lanes = bytes / sizeof(A);
  constexpr Width<Lanes<A, bytes>> width;
  Lanes<A, bytes> lane;
  for (int64_t j = 0; j < lanes; ++j) lane[j] = static_cast<A>(j);
  const auto all = lane >= 0;
  const int64_t whole = length / lanes * lanes, last = length - lanes;
  const auto unseen = lane >= static_cast<A>(whole - last);
  Lanes<A, bytes> sums[count][kBlock];
  for (int k = 0; k < kBlock; ++k) {
    Lanes<A, bytes> of_range[count] = {};
    for (int64_t i = 0; i < whole; i += lanes) add(k, width, i, all, of_range);
    if (whole < length) add(k, width, last, unseen, of_range);
    for (int j = 0; j < count; ++j) sums[j][k] = of_range[j];
  }
  for (int j = 0; j < count; ++j) sums_of_block<A, bytes>(sums[j], total + j * kBlock);
}

}  // namespace wsbcn
