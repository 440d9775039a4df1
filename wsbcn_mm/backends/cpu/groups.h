// The algebra between the passes over memory: statistics and coefficients of the channels of one
// group, from the sums over their rows. The formulas stand in backends/ops.py.
//
// All pointers point at the first channel of the group, `count` is its number of channels. Computed
// in double. A is the accumulation dtype: float, or double for double.
#pragma once

#include <cstdint>

namespace wsbcn {

// Parameters of a group. Null means: not there. weight and bias have one value per channel, or
// one for the group (`per_channel` false).
template <typename A>
struct GroupAffine {
  const A *batch_weight, *batch_bias, *weight, *bias;
  bool per_channel;
};

// Moments of the rows of `samples` samples, `stride` values apart.
template <typename A>
struct GroupMoments {
  const A *m, *q;
  int64_t samples, stride, count;
};

// A group of one sample: moments of its rows, statistics of its channels.
template <typename A>
struct Group {
  const A *m, *q, *mean;
  const double *inv_std, *gain;
  GroupAffine<A> affine;
  int64_t count;
};

// Coefficients of the result, y = (x - m) scale + shift, and the statistics of one sample.
template <typename A>
struct Coefficients {
  A *scale, *shift, *group_mean, *inv_group_std;
};

// What a backward pass knows of a group of one sample: its statistics, sums over its rows of
// `length` values of grad and of grad (x - m), the means over the group of h and h z.
template <typename A>
struct GroupSums {
  A group_mean, inv_group_std;
  const double *g, *gx;
  int64_t length;
  double *mean_h, *mean_hz;
};

// dx = p grad + slope (x - m) + r
template <typename A>
struct GradientCoefficients {
  A *p, *slope, *r;
};

// Gradients of the parameters, summed over samples, one value per channel each.
struct ParameterSums {
  double *batch_weight, *batch_bias, *weight, *bias;
};

#define WSBCN_GROUPS(A)                                                                        \
  /* mean, var <- their values after an update at `rate`; `sums`: space for 2 count values. */ \
  void update_channels(const GroupMoments<A>& moments, double rate, A* mean, A* var,           \
                       double* sums);                                                          \
  /* mean, var <- those of all samples, the variance biased. */                                \
  void batch_channels(const GroupMoments<A>& moments, A* mean, A* var, double* sums);          \
  /* inv_std = 1 / sqrt(var + eps), gain = batch_weight inv_std */                             \
  void channel_gains(const A* var, const A* batch_weight, double eps, int64_t count,           \
                     double* inv_std, double* gain);                                           \
  /* Stage 2 of one sample; `t`: space for count values. */                                    \
  void group_coefficients(const Group<A>& group, double eps, const Coefficients<A>& result,    \
                          double* t);                                                          \
  /* The coefficients of dx of one sample, and what GroupSums points at. */                    \
  void gradient_coefficients(const Group<A>& group, const GroupSums<A>& sums,                  \
                             const GradientCoefficients<A>& result);                           \
  /* Adds the parameter gradients of one sample. */                                            \
  void add_parameter_gradients(const Group<A>& group, const GroupSums<A>& sums,                \
                               const ParameterSums& result);

WSBCN_GROUPS(float)
WSBCN_GROUPS(double)
#undef WSBCN_GROUPS

}  // namespace wsbcn
