// Batch-Channel Normalization on the CPU; the contract and the formulas stand in backends/ops.py.
//
// With rows in memory (NCHW), what stage 2 needs lies in one group of one sample, and one thread
// takes it through statistics and result while it is in the cache: x is read from memory once. Only
// the statistics of a channel over several samples (the update of the estimates, batch mode
// backward) need a pass of their own before. With channels_last every step is a pass over all
// columns.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "rows.h"

#define WSBCN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "wsbcn_mm", __VA_ARGS__)

namespace wsbcn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Elements below which a second thread costs more than it saves.
constexpr int64_t kGrain = 16384;
// A chunk of channels_last columns stays in the first-level cache between two passes.
constexpr int64_t kColumnChunk = 8192;

struct Shape {
  int64_t samples, channels, groups, per_group, length;
  bool rows;  // one (sample, channel) after the other; else channels_last

  Shape(const Tensor& x, int64_t num_groups)
      : samples(x.size(0)),
        channels(x.size(1)),
        groups(num_groups),
        per_group(x.size(1) / num_groups),
        length(x.numel() / std::max<int64_t>(1, x.size(0) * x.size(1))),
        rows(x.is_contiguous()) {}

  // Positions of a chunk of columns, and chunks of a sample.
  int64_t chunk() const { return std::max<int64_t>(1, kColumnChunk / channels); }
  int64_t chunks() const { return (length + chunk() - 1) / chunk(); }
};

at::ScalarType accumulation(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void check_layout(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "x must be (N, C, *) and not empty");
  TORCH_CHECK(
      x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast) ||
          x.is_contiguous(at::MemoryFormat::ChannelsLast3d),
      "x must be contiguous or channels_last");
}

// An optional parameter, one value per channel or per group, as doubles per channel.
std::vector<double> per_channel(const OptionalTensor& values, int64_t channels, double otherwise) {
  std::vector<double> result(channels, otherwise);
  if (values.has_value()) {
    const Tensor dense = values->contiguous();
    const int64_t count = dense.numel(), repeat = channels / count;
    WSBCN_DISPATCH(dense.scalar_type(), [&] {
      const scalar_t* source = dense.const_data_ptr<scalar_t>();
      for (int64_t i = 0; i < count; ++i) {
        std::fill_n(result.data() + i * repeat, repeat, static_cast<double>(source[i]));
      }
    });
  }
  return result;
}

// Calls step(i) for i in [0, count), in parallel; each is about `elements` values of work.
template <typename Step>
void parallel(int64_t count, int64_t elements, const Step& step) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, elements));
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) step(i);
  });
}

// Calls step(n, g) for every sample and group, in the order of memory.
template <typename Step>
void over_groups(const Shape& s, const Step& step) {
  parallel(s.samples * s.groups, s.per_group * s.length,
           [&](int64_t i) { step(i / s.groups, i % s.groups); });
}

// Calls step(n, start, length, slot) for every chunk of columns: its first position in x, its
// length, and the place of its accumulators.
template <typename Step>
void over_chunks(const Shape& s, const Step& step) {
  const int64_t chunks = s.chunks(), chunk = s.chunk();
  parallel(s.samples * chunks, chunk * s.channels, [&](int64_t i) {
    const int64_t n = i / chunks, first = (i % chunks) * chunk;
    step(n, (n * s.length + first) * s.channels, std::min(chunk, s.length - first),
         i * s.channels);
  });
}

// Moments of rows from those of the chunks of a sample (Chan et al.), in the order of the chunks.
template <typename A>
void merge_moments(const Shape& s, const A* means, const A* squares, A* m, A* q) {
  const int64_t chunks = s.chunks();
  std::vector<double> mean(s.channels), square(s.channels);
  for (int64_t k = 0; k < chunks; ++k) {
    const int64_t seen = k * s.chunk(), count = std::min(s.chunk(), s.length - seen);
    const double share = static_cast<double>(count) / (seen + count);
    for (int64_t c = 0; c < s.channels; ++c) {
      const double delta = means[k * s.channels + c] - mean[c];
      mean[c] += delta * share;
      square[c] += squares[k * s.channels + c] + delta * delta * share * seen;
    }
  }
  for (int64_t c = 0; c < s.channels; ++c) {
    m[c] = static_cast<A>(mean[c]);
    q[c] = static_cast<A>(square[c] / s.length);
  }
}

// What the forward passes have in common: x, the tensors that the contract names, the coefficients.
template <typename T>
struct Forward {
  using A = Accumulate<T>;
  Shape s;
  const T* x;
  T* y;
  A *m, *q, *mean, *var, *group_mean, *inv_group_std;
  std::vector<double> batch_weight, batch_bias, weight, bias;
  double eps;
  bool update = false;
  double rate = 0;
  std::vector<double> inv_std, gain;  // (C,)
  std::vector<A> scale, shift;        // (N, C)

  // Moments of the rows of a group.
  void moments(int64_t n, int64_t g) const {
    const int64_t row = n * s.channels + g * s.per_group;
    std::vector<double> centre(s.per_group), variance(s.per_group);
    rows_moments(x + row * s.length, s.per_group, s.length, centre.data(), variance.data());
    for (int64_t i = 0; i < s.per_group; ++i) {
      m[row + i] = static_cast<A>(centre[i]);
      q[row + i] = static_cast<A>(variance[i]);
    }
  }

  // All moments, where they are needed before anything else.
  void all_moments() const {
    if (s.rows) {
      over_groups(s, [&](int64_t n, int64_t g) { moments(n, g); });
      return;
    }
    std::vector<A> means(s.samples * s.chunks() * s.channels), squares(means.size());
    over_chunks(s, [&](int64_t, int64_t start, int64_t length, int64_t slot) {
      column_moments(x + start, length, s.channels, means.data() + slot, squares.data() + slot);
    });
    for (int64_t n = 0; n < s.samples; ++n) {
      const int64_t slot = n * s.chunks() * s.channels, row = n * s.channels;
      merge_moments(s, means.data() + slot, squares.data() + slot, m + row, q + row);
    }
  }

  // Statistics of the channels of a group, updated before they are used.
  void channel_stage(int64_t g) {
    const int64_t c0 = g * s.per_group;
    for (int64_t c = c0; update && c < c0 + s.per_group; ++c) {
      double centre = 0, square = 0;
      const double old = mean[c];
      for (int64_t n = 0; n < s.samples; ++n) {
        const int64_t row = n * s.channels + c;
        const double delta = m[row] - old;  // around the old mean
        centre += m[row];
        square += q[row] + delta * delta;
      }
      mean[c] = static_cast<A>(old + rate * (centre / s.samples - old));
      var[c] = static_cast<A>(var[c] + rate * (square / s.samples - var[c]));
    }
    channel_gains(var + c0, batch_weight.data() + c0, eps, s.per_group, inv_std.data() + c0,
                  gain.data() + c0);
  }

  // Statistics of a group of a sample, and the coefficients of its rows.
  void group_stage(int64_t n, int64_t g) {
    const int64_t c0 = g * s.per_group, row = n * s.channels;
    std::vector<double> t(s.per_group);  // row means of x1
    double centre = 0, square = 0;
    for (int64_t i = 0, c = c0; i < s.per_group; ++i, ++c) {
      t[i] = gain[c] * (static_cast<double>(m[row + c]) - mean[c]) + batch_bias[c];
      centre += t[i];
    }
    centre /= s.per_group;
    for (int64_t i = 0, c = c0; i < s.per_group; ++i, ++c) {
      square += gain[c] * gain[c] * q[row + c] + (t[i] - centre) * (t[i] - centre);
    }
    const double inverse = 1 / std::sqrt(square / s.per_group + eps);
    group_mean[n * s.groups + g] = static_cast<A>(centre);
    inv_group_std[n * s.groups + g] = static_cast<A>(inverse);
    for (int64_t i = 0, c = c0; i < s.per_group; ++i, ++c) {
      scale[row + c] = static_cast<A>(weight[c] * inverse * gain[c]);
      shift[row + c] = static_cast<A>(weight[c] * inverse * (t[i] - centre) + bias[c]);
    }
  }

  void apply(int64_t n, int64_t g) const {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_affine(x + start, y + start, s.per_group, s.length, m + row, scale.data() + row,
                shift.data() + row);
  }

  void run(bool moments_are_there) {
    for (auto* values : {&inv_std, &gain}) values->resize(s.channels);
    scale.resize(s.samples * s.channels);
    shift.resize(s.samples * s.channels);
    if (s.rows && update && s.samples > 1 && s.per_group * s.length >= kColumnChunk / 2) {
      // Large groups stay in the cache over all samples.
      parallel(s.groups, s.samples * s.per_group * s.length, [&](int64_t g) {
        for (int64_t n = 0; n < s.samples; ++n) moments(n, g);
        channel_stage(g);
        for (int64_t n = 0; n < s.samples; ++n) {
          group_stage(n, g);
          apply(n, g);
        }
      });
      return;
    }
    // Statistics over samples come first; of a single sample they are the group's own business.
    const bool first_pass = !moments_are_there && (!s.rows || (update && s.samples > 1));
    if (first_pass) all_moments();
    const bool with_group = update && !first_pass;
    if (!with_group)
      parallel(s.groups, s.samples * s.per_group, [&](int64_t g) { channel_stage(g); });
    if (s.rows) {
      over_groups(s, [&](int64_t n, int64_t g) {
        if (!first_pass && !moments_are_there) moments(n, g);
        if (with_group) channel_stage(g);
        group_stage(n, g);
        apply(n, g);
      });
      return;
    }
    parallel(s.samples * s.groups, s.per_group,
             [&](int64_t i) { group_stage(i / s.groups, i % s.groups); });
    over_chunks(s, [&](int64_t n, int64_t start, int64_t length, int64_t) {
      const int64_t row = n * s.channels;
      column_affine(x + start, y + start, length, s.channels, m + row, scale.data() + row,
                    shift.data() + row);
    });
  }
};

std::tuple<Tensor, Tensor> row_moments_op(const Tensor& x) {
  check_layout(x);
  const auto options = x.options().dtype(accumulation(x));
  Tensor m = at::empty({x.size(0), x.size(1)}, options), q = at::empty_like(m);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    Forward<scalar_t> f{Shape(x, 1), x.const_data_ptr<scalar_t>()};
    f.m = m.data_ptr<A>();
    f.q = q.data_ptr<A>();
    f.all_moments();
  });
  return {m, q};
}

// What `forward` writes. The large tensor first: memory that lies at the end of the heap when it is
// freed is given back to the system, and costs a page fault per page when it is asked for again.
struct Results {
  Tensor y, group_mean, inv_group_std;

  Results(const Tensor& x, int64_t num_groups)
      : y(at::empty_like(x)),
        group_mean(at::empty({x.size(0), num_groups}, x.options().dtype(accumulation(x)))),
        inv_group_std(at::empty_like(group_mean)) {}
};

void forward(
    Results& results, const Tensor& x, const Tensor& m, const Tensor& q, bool moments_are_there, const Tensor& mean,
    const Tensor& var, int64_t num_groups, const OptionalTensor& batch_weight,
    const OptionalTensor& batch_bias, const OptionalTensor& weight, const OptionalTensor& bias,
    bool update, double rate, double eps) {
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const int64_t channels = x.size(1);
    Forward<scalar_t> f{
        Shape(x, num_groups), x.const_data_ptr<scalar_t>(), results.y.data_ptr<scalar_t>(),
        m.data_ptr<A>(), q.data_ptr<A>(), mean.data_ptr<A>(), var.data_ptr<A>(),
        results.group_mean.data_ptr<A>(), results.inv_group_std.data_ptr<A>(),
        per_channel(batch_weight, channels, 1), per_channel(batch_bias, channels, 0),
        per_channel(weight, channels, 1), per_channel(bias, channels, 0), eps, update, rate};
    f.run(moments_are_there);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_with_estimates(
    const Tensor& x, int64_t num_groups, Tensor& running_mean, Tensor& running_var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, bool update, double momentum,
    const OptionalTensor& rate, double eps) {
  check_layout(x);
  Results results(x, num_groups);
  const auto options = x.options().dtype(accumulation(x));
  Tensor m = at::empty({x.size(0), x.size(1)}, options), q = at::empty_like(m);
  Tensor mean = running_mean.to(options.dtype(), /*non_blocking=*/false, /*copy=*/true).contiguous();
  Tensor var = running_var.to(options.dtype(), /*non_blocking=*/false, /*copy=*/true).contiguous();
  const double r = rate.has_value() ? rate->item<double>() : momentum;
  forward(results, x, m, q, false, mean, var, num_groups, batch_weight, batch_bias, weight, bias,
          update, r, eps);
  if (update) {
    running_mean.copy_(mean);
    running_var.copy_(var);
  }
  return {results.y, m, q, mean, var, results.group_mean, results.inv_group_std};
}

std::tuple<Tensor, Tensor, Tensor> normalize(
    const Tensor& x, const Tensor& m, const Tensor& q, const Tensor& mean, const Tensor& var,
    int64_t num_groups, const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check_layout(x);
  Results results(x, num_groups);
  forward(results, x, m.contiguous(), q.contiguous(), true, mean.contiguous(), var.contiguous(),
          num_groups, batch_weight, batch_bias, weight, bias, false, 0, eps);
  return {results.y, results.group_mean, results.inv_group_std};
}

template <typename T>
struct Backward {
  using A = Accumulate<T>;
  Shape s;
  const T *grad, *x;
  T* dx;
  const A *m, *q, *mean, *var, *group_mean, *inv_group_std;
  std::vector<double> batch_weight, batch_bias, weight;
  double eps;
  bool through_statistics;
  A *d_batch_weight, *d_batch_bias, *d_weight, *d_bias;
  int64_t affine_size;
  std::vector<double> inv_std, gain;    // (C,)
  std::vector<double> sum_g, sum_gx;    // (N, C)
  std::vector<double> mean_h, mean_hz;  // (N, G)
  std::vector<A> p, slope, r;           // (N, C): dx = p g + slope (x - m) + r

  void dots(int64_t n, int64_t g) {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_dots(grad + start, x + start, s.per_group, s.length, m + row, sum_g.data() + row,
              sum_gx.data() + row);
  }

  // Row mean of x1, centred in its group.
  double centred(int64_t n, int64_t c, int64_t g) const {
    return gain[c] * (static_cast<double>(m[n * s.channels + c]) - mean[c]) + batch_bias[c] -
        group_mean[n * s.groups + g];
  }

  // Row sum of grad times z, the normalised x1 before the outer affine.
  double sum_gz(int64_t n, int64_t c, int64_t g) const {
    const int64_t row = n * s.channels + c;
    return inv_group_std[n * s.groups + g] *
        (gain[c] * sum_gx[row] + centred(n, c, g) * sum_g[row]);
  }

  // dx1 = inverse (h - mean(h) - z mean(h z)) with h = weight grad, the means over a group.
  void group_stage(int64_t n, int64_t g) {
    const int64_t c0 = g * s.per_group, c1 = c0 + s.per_group, row = n * s.channels;
    const double inverse = inv_group_std[n * s.groups + g];
    double h = 0, hz = 0;
    for (int64_t c = c0; c < c1; ++c) {
      h += weight[c] * sum_g[row + c];
      hz += weight[c] * sum_gz(n, c, g);
    }
    const double values = static_cast<double>(s.length) * s.per_group;
    mean_h[n * s.groups + g] = h /= values;
    mean_hz[n * s.groups + g] = hz /= values;
    for (int64_t c = c0; c < c1; ++c) {
      p[row + c] = static_cast<A>(gain[c] * inverse * weight[c]);
      slope[row + c] = static_cast<A>(-gain[c] * gain[c] * inverse * inverse * hz);
      r[row + c] = static_cast<A>(-gain[c] * inverse * (h + inverse * hz * centred(n, c, g)));
    }
  }

  // Gradients of the parameters of a group; the row sums of dx1 give those of stage 1.
  void parameters(int64_t g) {
    const double length = static_cast<double>(s.length);
    double group_weight = 0, group_bias = 0;
    for (int64_t c = g * s.per_group; c < (g + 1) * s.per_group; ++c) {
      double d_bw = 0, d_bb = 0, d_w = 0, d_b = 0;
      for (int64_t n = 0; n < s.samples; ++n) {
        const int64_t row = n * s.channels + c, group = n * s.groups + g;
        const double inverse = inv_group_std[group], hz = mean_hz[group];
        const double sum_dx1 = inverse *
            (weight[c] * sum_g[row] - length * (mean_h[group] + inverse * hz * centred(n, c, g)));
        const double sum_dx1_x =
            inverse * (weight[c] * sum_gx[row] - inverse * hz * gain[c] * length * q[row]);
        d_b += sum_g[row];
        d_w += sum_gz(n, c, g);
        d_bb += sum_dx1;
        d_bw += (sum_dx1_x + (static_cast<double>(m[row]) - mean[c]) * sum_dx1) * inv_std[c];
      }
      d_batch_weight[c] = static_cast<A>(d_bw);
      d_batch_bias[c] = static_cast<A>(d_bb);
      group_weight += d_w;
      group_bias += d_b;
      if (affine_size == s.channels) {
        d_weight[c] = static_cast<A>(d_w);
        d_bias[c] = static_cast<A>(d_b);
      }
      if (!through_statistics) continue;
      // BatchNorm's own two terms
      const double count = length * s.samples, towards_var = gain[c] * inv_std[c] * d_bw / count;
      for (int64_t n = 0; n < s.samples; ++n) {
        const int64_t row = n * s.channels + c;
        slope[row] -= static_cast<A>(towards_var);
        r[row] -= static_cast<A>(
            gain[c] * d_bb / count + towards_var * (static_cast<double>(m[row]) - mean[c]));
      }
    }
    if (affine_size == s.groups && affine_size != s.channels) {
      d_weight[g] = static_cast<A>(group_weight);
      d_bias[g] = static_cast<A>(group_bias);
    }
  }

  void gradient(int64_t n, int64_t g) {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_gradient(grad + start, x + start, dx + start, s.per_group, s.length, m + row,
                  p.data() + row, slope.data() + row, r.data() + row);
  }

  void all_dots() {
    std::vector<A> parts_g(s.samples * s.chunks() * s.channels), parts_gx(parts_g.size());
    over_chunks(s, [&](int64_t n, int64_t start, int64_t length, int64_t slot) {
      column_dots(grad + start, x + start, length, s.channels, m + n * s.channels,
                  parts_g.data() + slot, parts_gx.data() + slot);
    });
    for (int64_t k = 0; k < s.samples * s.chunks(); ++k) {
      const int64_t row = k / s.chunks() * s.channels;
      for (int64_t c = 0; c < s.channels; ++c) {
        sum_g[row + c] += parts_g[k * s.channels + c];
        sum_gx[row + c] += parts_gx[k * s.channels + c];
      }
    }
  }

  void run() {
    for (auto* values : {&inv_std, &gain}) values->resize(s.channels);
    for (auto* values : {&sum_g, &sum_gx}) values->resize(s.samples * s.channels);
    for (auto* values : {&mean_h, &mean_hz}) values->resize(s.samples * s.groups);
    for (auto* values : {&p, &slope, &r}) values->resize(s.samples * s.channels);
    channel_gains(var, batch_weight.data(), eps, s.channels, inv_std.data(), gain.data());
    const auto all_parameters = [&] {
      parallel(s.groups, s.samples * s.per_group, [&](int64_t g) { parameters(g); });
    };
    if (s.rows && !through_statistics) {
      over_groups(s, [&](int64_t n, int64_t g) {
        dots(n, g);
        group_stage(n, g);
        gradient(n, g);
      });
      all_parameters();
    } else if (s.rows) {
      over_groups(s, [&](int64_t n, int64_t g) {
        dots(n, g);
        group_stage(n, g);
      });
      all_parameters();
      over_groups(s, [&](int64_t n, int64_t g) { gradient(n, g); });
    } else {
      all_dots();
      parallel(s.samples * s.groups, s.per_group,
               [&](int64_t i) { group_stage(i / s.groups, i % s.groups); });
      all_parameters();
      over_chunks(s, [&](int64_t n, int64_t start, int64_t length, int64_t) {
        const int64_t row = n * s.channels;
        column_gradient(grad + start, x + start, dx + start, length, s.channels, m + row,
                        p.data() + row, slope.data() + row, r.data() + row);
      });
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> normalize_backward(
    const Tensor& grad, const Tensor& x, const Tensor& m, const Tensor& q, const Tensor& mean,
    const Tensor& var, const Tensor& group_mean, const Tensor& inv_group_std,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, int64_t num_groups, int64_t affine_size, double eps,
    bool through_statistics) {
  check_layout(x);
  // Strides of axes of size 1 say nothing: ask for the layout, not for equal strides.
  const auto layout = x.is_contiguous() ? at::MemoryFormat::Contiguous
      : x.dim() == 4                    ? at::MemoryFormat::ChannelsLast
                                        : at::MemoryFormat::ChannelsLast3d;
  TORCH_CHECK(grad.is_contiguous(layout) && grad.scalar_type() == x.scalar_type(),
              "grad must have the layout and dtype of x");
  Tensor dx = at::empty_like(x);
  Tensor d_batch_weight = at::empty({x.size(1)}, m.options());
  Tensor d_batch_bias = at::empty_like(d_batch_weight);
  Tensor d_weight = at::empty({affine_size}, m.options()), d_bias = at::empty_like(d_weight);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const int64_t channels = x.size(1);
    Backward<scalar_t> b{
        Shape(x, num_groups), grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
        dx.data_ptr<scalar_t>(), m.const_data_ptr<A>(), q.const_data_ptr<A>(),
        mean.const_data_ptr<A>(), var.const_data_ptr<A>(), group_mean.const_data_ptr<A>(),
        inv_group_std.const_data_ptr<A>(), per_channel(batch_weight, channels, 1),
        per_channel(batch_bias, channels, 0), per_channel(weight, channels, 1), eps,
        through_statistics, d_batch_weight.data_ptr<A>(), d_batch_bias.data_ptr<A>(),
        d_weight.data_ptr<A>(), d_bias.data_ptr<A>(), affine_size};
    b.run();
  });
  return {dx, d_batch_weight, d_batch_bias, d_weight, d_bias};
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CPU, library) {
  library.impl("row_moments", row_moments_op);
  library.impl("normalize_with_estimates", normalize_with_estimates);
  library.impl("normalize", normalize);
  library.impl("normalize_backward", normalize_backward);
}

}  // namespace
}  // namespace wsbcn
