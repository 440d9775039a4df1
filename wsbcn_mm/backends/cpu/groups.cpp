#include "groups.h"

#include <algorithm>
#include <cmath>

#include "clones.h"

namespace wsbcn {

template <typename A>
WSBCN_INLINE
void updated_channels(const GroupMoments<A>& moments, double rate, A* mean, A* var, double* sums) {
  const int64_t samples = moments.samples, count = moments.count;
  const A *m = moments.m, *q = moments.q;
  double *centre = sums, *square = sums + count;
  std::fill_n(sums, 2 * count, 0.0);
  for (int64_t n = 0; n < samples; ++n, m += moments.stride, q += moments.stride) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const double delta = static_cast<double>(m[c]) - mean[c];  // around the old mean
      centre[c] += m[c];
      square[c] += q[c] + delta * delta;
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    const double old_mean = mean[c], old_var = var[c];
    mean[c] = static_cast<A>(old_mean + rate * (centre[c] / samples - old_mean));
    var[c] = static_cast<A>(old_var + rate * (square[c] / samples - old_var));
  }
}

template <typename A>
WSBCN_INLINE
void batch_of_channels(const GroupMoments<A>& moments, A* mean, A* var, double* sums) {
  const int64_t samples = moments.samples, count = moments.count, stride = moments.stride;
  double *centre = sums, *square = sums + count;
  std::fill_n(sums, 2 * count, 0.0);
  for (int64_t n = 0; n < samples; ++n) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) centre[c] += moments.m[n * stride + c];
  }
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    centre[c] /= samples;
    mean[c] = static_cast<A>(centre[c]);
  }
  for (int64_t n = 0; n < samples; ++n) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const double delta = moments.m[n * stride + c] - centre[c];
      square[c] += moments.q[n * stride + c] + delta * delta;
    }
  }
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) var[c] = static_cast<A>(square[c] / samples);
}

template <typename A>
WSBCN_INLINE
void gains_of_channels(const A* var, const A* batch_weight, double eps, int64_t count,
                       double* inv_std, double* gain) {
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) {
    inv_std[c] = 1 / std::sqrt(static_cast<double>(var[c]) + eps);
    gain[c] = inv_std[c];
  }
  if (!batch_weight) return;
#pragma omp simd
  for (int64_t c = 0; c < count; ++c) gain[c] *= batch_weight[c];
}

// Row mean of x1 less `group_mean`.
template <typename A>
WSBCN_INLINE
double centred(int64_t c, const A* m, const A* mean, const double* gain, const A* batch_bias,
               double group_mean) {
  const double t = gain[c] * (static_cast<double>(m[c]) - mean[c]);
  return (batch_bias ? t + batch_bias[c] : t) - group_mean;
}

// Calls body(c, weight) for every channel with the outer scale there.
template <typename A, typename Body>
WSBCN_INLINE
void with_weight(const GroupAffine<A>& affine, int64_t count, const Body& body) {
  if (affine.weight && affine.per_channel) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) body(c, static_cast<double>(affine.weight[c]));
  } else {
    const double weight = affine.weight ? *affine.weight : 1;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) body(c, weight);
  }
}

// Calls act(count); of a usual number of channels with a number that the compiler knows, for the
// loops of small groups take longer to begin and to end than to run.
template <typename Act>
WSBCN_INLINE
void with_count(int64_t count, const Act& act) {
  switch (count) {
    case 2:
      return act(2);
    case 4:
      return act(4);
    case 8:
      return act(8);
    case 16:
      return act(16);
    default:
      return act(count);
  }
}

template <typename A>
WSBCN_INLINE
void coefficients_of_group(const Group<A>& group, int64_t count, double eps,
                           const Coefficients<A>& result, double* t) {
  const A *m = group.m, *q = group.q, *mean = group.mean;
  const double* gain = group.gain;
  const GroupAffine<A> affine = group.affine;
  double sum = 0, square = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t c = 0; c < count; ++c) {
    t[c] = centred(c, m, mean, gain, affine.batch_bias, 0);
    sum += t[c];
  }
  const double centre = sum / count;
#pragma omp simd reduction(+ : square)
  for (int64_t c = 0; c < count; ++c) {
    t[c] -= centre;
    square += gain[c] * gain[c] * q[c] + t[c] * t[c];
  }
  const double inverse = 1 / std::sqrt(square / count + eps);
  *result.group_mean = static_cast<A>(centre);
  *result.inv_group_std = static_cast<A>(inverse);
  with_weight(affine, count, [&](int64_t c, double weight) WSBCN_INLINED {
    result.scale[c] = static_cast<A>(weight * inverse * gain[c]);
    t[c] *= weight * inverse;
  });
  if (affine.bias && affine.per_channel) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) result.shift[c] = static_cast<A>(t[c] + affine.bias[c]);
  } else {
    const double bias = affine.bias ? *affine.bias : 0;
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) result.shift[c] = static_cast<A>(t[c] + bias);
  }
}

// dx1 = inverse (h - mean(h) - z mean(h z)) with h = weight grad, the means over a group.
template <typename A>
WSBCN_INLINE
void gradient_of_group(const Group<A>& group, int64_t count, const GroupSums<A>& sums,
                       const GradientCoefficients<A>& result) {
  const A *m = group.m, *mean = group.mean;
  const double *gain = group.gain, *sum_g = sums.g, *sum_gx = sums.gx;
  const GroupAffine<A> affine = group.affine;
  const double group_mean = sums.group_mean, inverse = sums.inv_group_std;
  double h = 0, hz = 0;
  const A* batch_bias = affine.batch_bias;
  const double group_weight = affine.weight && !affine.per_channel ? *affine.weight : 1;
  if (affine.weight && affine.per_channel) {
#pragma omp simd reduction(+ : h, hz)
    for (int64_t c = 0; c < count; ++c) {
      h += affine.weight[c] * sum_g[c];
      hz += affine.weight[c] *
            (gain[c] * sum_gx[c] + centred(c, m, mean, gain, batch_bias, group_mean) * sum_g[c]);
    }
  } else {
#pragma omp simd reduction(+ : h, hz)
    for (int64_t c = 0; c < count; ++c) {
      h += sum_g[c];
      hz += gain[c] * sum_gx[c] + centred(c, m, mean, gain, batch_bias, group_mean) * sum_g[c];
    }
  }
  const double values = static_cast<double>(sums.length) * count;
  *sums.mean_h = h *= group_weight / values;
  *sums.mean_hz = hz *= group_weight * inverse / values;
  const double towards_z = inverse * hz;
  with_weight(affine, count, [&](int64_t c, double weight) WSBCN_INLINED {
    result.p[c] = static_cast<A>(gain[c] * inverse * weight);
    result.slope[c] = static_cast<A>(-gain[c] * gain[c] * inverse * towards_z);
    result.r[c] = static_cast<A>(
        -gain[c] * inverse * (h + towards_z * centred(c, m, mean, gain, batch_bias, group_mean)));
  });
}

// The row sums of dx1 give the gradients of stage 1.
template <typename A>
WSBCN_INLINE
void parameters_of_group(const Group<A>& group, int64_t count, const GroupSums<A>& sums,
                         const ParameterSums& result) {
  const A *m = group.m, *q = group.q, *mean = group.mean;
  const double *gain = group.gain, *inv_std = group.inv_std, *sum_g = sums.g, *sum_gx = sums.gx;
  const double group_mean = sums.group_mean, inverse = sums.inv_group_std;
  const double mean_h = *sums.mean_h, towards_z = inverse * *sums.mean_hz;
  const double values = static_cast<double>(sums.length);
  const A* batch_bias = group.affine.batch_bias;
  with_weight(group.affine, count, [&](int64_t c, double weight) WSBCN_INLINED {
    const double t = centred(c, m, mean, gain, batch_bias, group_mean);
    const double dx1 = inverse * (weight * sum_g[c] - values * (mean_h + towards_z * t));
    const double dx1_x = inverse * (weight * sum_gx[c] - towards_z * gain[c] * values * q[c]);
    result.bias[c] += sum_g[c];
    result.weight[c] += inverse * (gain[c] * sum_gx[c] + t * sum_g[c]);
    result.batch_bias[c] += dx1;
    result.batch_weight[c] += (dx1_x + (static_cast<double>(m[c]) - mean[c]) * dx1) * inv_std[c];
  });
}

#define WSBCN_DEFINE(A)                                                                     \
  WSBCN_CLONES                                                                              \
  void update_channels(const GroupMoments<A>& moments, double rate, A* mean, A* var,        \
                       double* sums) {                                                      \
    updated_channels(moments, rate, mean, var, sums);                                       \
  }                                                                                         \
  WSBCN_CLONES                                                                              \
  void batch_channels(const GroupMoments<A>& moments, A* mean, A* var, double* sums) {      \
    batch_of_channels(moments, mean, var, sums);                                            \
  }                                                                                         \
  WSBCN_CLONES                                                                              \
  void channel_gains(const A* var, const A* batch_weight, double eps, int64_t count,        \
                     double* inv_std, double* gain) {                                       \
    gains_of_channels(var, batch_weight, eps, count, inv_std, gain);                        \
  }                                                                                         \
  WSBCN_CLONES                                                                              \
  void group_coefficients(const Group<A>& group, double eps, const Coefficients<A>& result, \
                          double* t) {                                                      \
    with_count(group.count, [&](int64_t count) WSBCN_INLINED {                              \
      coefficients_of_group(group, count, eps, result, t);                                  \
    });                                                                                     \
  }                                                                                         \
  WSBCN_CLONES                                                                              \
  void gradient_coefficients(const Group<A>& group, const GroupSums<A>& sums,               \
                             const GradientCoefficients<A>& result) {                       \
    with_count(group.count, [&](int64_t count) WSBCN_INLINED {                              \
      gradient_of_group(group, count, sums, result);                                        \
    });                                                                                     \
  }                                                                                         \
  WSBCN_CLONES                                                                              \
  void add_parameter_gradients(const Group<A>& group, const GroupSums<A>& sums,             \
                               const ParameterSums& result) {                               \
    with_count(group.count, [&](int64_t count) WSBCN_INLINED {                              \
      parameters_of_group(group, count, sums, result);                                      \
    });                                                                                     \
  }

WSBCN_DEFINE(float)
WSBCN_DEFINE(double)

}  // namespace wsbcn
