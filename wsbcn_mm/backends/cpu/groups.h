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
struct Affine {
  const A *batch_weight, *batch_bias, *weight, *bias;
  bool per_channel;
};

// Coefficients of the result, y = (x - m) scale + shift, and the statistics of one sample.
template <typename A>
struct Coefficients {
  A *scale, *shift, *group_mean, *inv_group_std;
};

#define WSBCN_GROUPS(A)                                                                           \
  /* mean, var <- their values after an update at `rate`, from the moments m, q of `samples` */   \
  /* samples, `stride` values apart; `sums`: space for 2 count values. */                         \
  void update_channels(                                                                           \
      const A* m, const A* q, int64_t samples, int64_t stride, double rate, int64_t count,        \
      A* mean, A* var, double* sums);                                                             \
  /* inv_std = 1 / sqrt(var + eps), gain = batch_weight inv_std */                                \
  void channel_gains(                                                                             \
      const A* var, const A* batch_weight, double eps, int64_t count, double* inv_std,            \
      double* gain);                                                                              \
  /* Stage 2 of one sample; `t`: space for count values. */                                       \
  void group_coefficients(                                                                        \
      const A* m, const A* q, const A* mean, const double* gain, const Affine<A>& affine,         \
      double eps, int64_t count, const Coefficients<A>& result, double* t);                       \
  /* dx = p grad + slope (x - m) + r of one sample; the means over the group of h and h z. */     \
  void gradient_coefficients(                                                                     \
      const A* m, const A* mean, const double* gain, const Affine<A>& affine, A group_mean,       \
      A inv_group_std, const double* sum_g, const double* sum_gx, int64_t length, int64_t count,  \
      A* p, A* slope, A* r, double* mean_h, double* mean_hz);                                     \
  /* Adds the parameter gradients of one sample to sums over samples, count values each. */       \
  void add_parameter_gradients(                                                                   \
      const A* m, const A* q, const A* mean, const double* gain, const double* inv_std,           \
      const Affine<A>& affine, A group_mean, A inv_group_std, const double* sum_g,                \
      const double* sum_gx, double mean_h, double mean_hz, int64_t length, int64_t count,         \
      double* d_batch_weight, double* d_batch_bias, double* d_weight, double* d_bias);

WSBCN_GROUPS(float)
WSBCN_GROUPS(double)
#undef WSBCN_GROUPS

}  // namespace wsbcn
