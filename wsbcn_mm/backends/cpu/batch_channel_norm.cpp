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
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "groups.h"
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

// The smallest number that becomes infinite in the dtype of a buffer.
double overflow(const Tensor& buffer) {
  switch (buffer.scalar_type()) {
    case at::kHalf: return 65520;
    case at::kBFloat16: return std::ldexp(511., 119);
    default: return std::numeric_limits<double>::infinity();  // an A has become infinite by itself
  }
}

void check_layout(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 2 && x.numel() > 0, "x must be (N, C, *) and not empty");
  TORCH_CHECK(
      x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast) ||
          x.is_contiguous(at::MemoryFormat::ChannelsLast3d),
      "x must be contiguous or channels_last");
}

// Memory for the time of a call, not initialised.
template <typename V>
struct Scratch {
  std::unique_ptr<V[]> values;

  explicit Scratch(int64_t count) : values(new V[count]) {}
  operator V*() const { return values.get(); }
};

// The values of a parameter or buffer as dense A: its own memory wherever it is that already.
template <typename A>
struct Values {
  Tensor kept;
  const A* data = nullptr;

  explicit Values(const OptionalTensor& source) {
    if (!source.has_value() || !source->defined()) return;
    kept = source->contiguous().to(c10::CppTypeToScalarType<A>::value);
    data = kept.const_data_ptr<A>();
  }
};

// The parameters of a call; `at(g)`: those of a group.
template <typename A>
struct Parameters {
  Values<A> batch_weight, batch_bias, weight, bias;
  int64_t per_group;
  bool per_channel;

  Parameters(const OptionalTensor& batch_weight_, const OptionalTensor& batch_bias_,
             const OptionalTensor& weight_, const OptionalTensor& bias_, int64_t channels,
             int64_t groups)
      : batch_weight(batch_weight_),
        batch_bias(batch_bias_),
        weight(expanded(weight_, bias_, channels)),
        bias(expanded(bias_, weight_, channels)),
        per_group(channels / groups),
        per_channel(count(weight_) == channels || count(bias_) == channels) {}

  Affine<A> at(int64_t g) const {
    const int64_t c = g * per_group, outer = per_channel ? c : g;
    return {from(batch_weight, c), from(batch_bias, c), from(weight, outer), from(bias, outer),
            per_channel};
  }

 private:
  static const A* from(const Values<A>& values, int64_t i) {
    return values.data ? values.data + i : nullptr;
  }
  static int64_t count(const OptionalTensor& values) {
    return values.has_value() && values->defined() ? values->numel() : 0;
  }
  // One of scale and shift per channel, the other per group: both per channel.
  static OptionalTensor expanded(
      const OptionalTensor& values, const OptionalTensor& other, int64_t channels) {
    if (count(values) == 0 || count(values) >= count(other)) return values;
    return values->repeat_interleave(channels / count(values));
  }
};

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

// The moments of the rows of x.
template <typename T>
struct Moments {
  using A = Accumulate<T>;
  const Shape& s;
  const T* x;
  A *m, *q;

  void of_group(int64_t n, int64_t g) const {
    constexpr int64_t kRows = 64;
    double centre[kRows], variance[kRows];
    const int64_t first = n * s.channels + g * s.per_group, end = first + s.per_group;
    for (int64_t row = first; row < end; row += kRows) {
      const int64_t rows = std::min(kRows, end - row);
      rows_moments(x + row * s.length, rows, s.length, centre, variance);
      for (int64_t i = 0; i < rows; ++i) {
        m[row + i] = static_cast<A>(centre[i]);
        q[row + i] = static_cast<A>(variance[i]);
      }
    }
  }

  // All of them, where they are needed before anything else.
  void of_all() const {
    if (s.rows) {
      over_groups(s, [&](int64_t n, int64_t g) { of_group(n, g); });
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
};

// What the forward passes have in common: x, the tensors that the contract names, the coefficients.
template <typename T>
struct Forward {
  using A = Accumulate<T>;
  Shape s;
  const T* x;
  T* y;
  A *m, *q, *mean, *var, *group_mean, *inv_group_std;
  const Parameters<A>& parameters;
  double eps;
  bool update;
  double rate;
  double limit = 0;           // the smallest number that the buffers cannot hold
  int64_t* counts = nullptr;  // (2, C): samples taken in, updates left out
  Scratch<A> old{update ? 2 * s.channels : 0};
  Scratch<double> inv_std{s.channels}, gain{s.channels};
  // Space for either stage: threads may be in different ones.
  Scratch<double> of_channels{2 * s.channels}, of_rows{s.samples * s.channels};
  Scratch<A> scale{s.samples * s.channels}, shift{s.samples * s.channels};

  // Statistics of the channels of a group, updated before they are used.
  void channel_stage(int64_t g) {
    const int64_t c = g * s.per_group;
    if (update) {
      std::copy_n(mean + c, s.per_group, old + c);
      std::copy_n(var + c, s.per_group, old + s.channels + c);
      update_channels(m + c, q + c, s.samples, s.channels, rate, s.per_group, mean + c, var + c,
                      of_channels + 2 * c);
      keep_finite(c, c + s.per_group);
    }
    channel_gains(var + c, parameters.at(g).batch_weight, eps, s.per_group, inv_std + c, gain + c);
  }

  // Channels in which an estimate would not be finite keep theirs.
  void keep_finite(int64_t first, int64_t last) const {
    for (int64_t c = first; c < last; ++c) {
      const bool finite = std::abs(mean[c]) < limit && std::abs(var[c]) < limit;  // not of a NaN
      if (!finite) {
        mean[c] = old[c];
        var[c] = old[s.channels + c];
      }
      if (counts != nullptr) counts[finite ? c : s.channels + c] += finite ? s.samples : 1;
    }
  }

  // Statistics of a group of a sample, and the coefficients of its rows.
  void group_stage(int64_t n, int64_t g) {
    const int64_t c = g * s.per_group, row = n * s.channels + c, group = n * s.groups + g;
    group_coefficients(m + row, q + row, mean + c, gain + c, parameters.at(g), eps, s.per_group,
                       {scale + row, shift + row, group_mean + group, inv_group_std + group},
                       of_rows + row);
  }

  void apply(int64_t n, int64_t g) const {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_affine(x + start, y + start, s.per_group, s.length, m + row, scale + row, shift + row);
  }

  void run(bool moments_are_there) {
    const Moments<T> moments{s, x, m, q};
    if (s.rows && update && s.samples > 1 && s.per_group * s.length >= kColumnChunk / 2) {
      // Large groups stay in the cache over all samples.
      parallel(s.groups, s.samples * s.per_group * s.length, [&](int64_t g) {
        for (int64_t n = 0; n < s.samples; ++n) moments.of_group(n, g);
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
    if (first_pass) moments.of_all();
    const bool with_group = s.samples == 1 && !first_pass;
    if (!with_group)
      parallel(s.groups, s.samples * s.per_group, [&](int64_t g) { channel_stage(g); });
    if (s.rows) {
      over_groups(s, [&](int64_t n, int64_t g) {
        if (!first_pass && !moments_are_there) moments.of_group(n, g);
        if (with_group) channel_stage(g);
        group_stage(n, g);
        apply(n, g);
      });
      return;
    }
    parallel(s.samples * s.groups, s.per_group, [&](int64_t i) {
      if (with_group) channel_stage(i);
      group_stage(i / s.groups, i % s.groups);
    });
    over_chunks(s, [&](int64_t n, int64_t start, int64_t length, int64_t) {
      const int64_t row = n * s.channels;
      column_affine(x + start, y + start, length, s.channels, m + row, scale + row, shift + row);
    });
  }
};

std::tuple<Tensor, Tensor> row_moments_op(const Tensor& x) {
  check_layout(x);
  const auto options = x.options().dtype(accumulation(x));
  Tensor m = at::empty({x.size(0), x.size(1)}, options), q = at::empty_like(m);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Shape shape(x, 1);
    Moments<scalar_t>{shape, x.const_data_ptr<scalar_t>(), m.data_ptr<A>(), q.data_ptr<A>()}
        .of_all();
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
    Results& results, const Tensor& x, const Tensor& m, const Tensor& q, bool moments_are_there,
    const Tensor& mean, const Tensor& var, int64_t num_groups, const OptionalTensor& batch_weight,
    const OptionalTensor& batch_bias, const OptionalTensor& weight, const OptionalTensor& bias,
    bool update, double rate, double eps, double limit = 0, int64_t* counts = nullptr) {
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Parameters<A> parameters(batch_weight, batch_bias, weight, bias, x.size(1), num_groups);
    Forward<scalar_t> f{
        Shape(x, num_groups), x.const_data_ptr<scalar_t>(), results.y.data_ptr<scalar_t>(),
        m.data_ptr<A>(), q.data_ptr<A>(), mean.data_ptr<A>(), var.data_ptr<A>(),
        results.group_mean.data_ptr<A>(), results.inv_group_std.data_ptr<A>(), parameters, eps,
        update, rate, limit, counts};
    f.run(moments_are_there);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_with_estimates(
    const Tensor& x, int64_t num_groups, Tensor& running_mean, Tensor& running_var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, bool update, double momentum,
    const OptionalTensor& rate, double eps, const OptionalTensor& counts) {
  check_layout(x);
  Results results(x, num_groups);
  const auto options = x.options().dtype(accumulation(x));
  Tensor m = at::empty({x.size(0), x.size(1)}, options), q = at::empty_like(m);
  Tensor mean = at::empty({x.size(1)}, options).copy_(running_mean);
  Tensor var = at::empty({x.size(1)}, options).copy_(running_var);
  const double r = rate.has_value() ? rate->item<double>() : momentum;
  forward(results, x, m, q, false, mean, var, num_groups, batch_weight, batch_bias, weight, bias,
          update, r, eps, std::min(overflow(running_mean), overflow(running_var)),
          counts.has_value() ? counts->data_ptr<int64_t>() : nullptr);
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

// The result alone: nothing is copied and no statistics are kept.
Tensor evaluate(
    const Tensor& x, int64_t num_groups, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check_layout(x);
  Tensor y = at::empty_like(x);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Parameters<A> parameters(batch_weight, batch_bias, weight, bias, x.size(1), num_groups);
    const Shape s(x, num_groups);
    const Scratch<A> m(s.samples * s.channels), q(s.samples * s.channels);
    const Scratch<A> group_mean(s.samples * s.groups), inv_group_std(s.samples * s.groups);
    const Values<A> mean(running_mean), var(running_var);
    // Without an update they are only read.
    Forward<scalar_t> f{
        s, x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(), m, q, const_cast<A*>(mean.data),
        const_cast<A*>(var.data), group_mean, inv_group_std, parameters, eps, false, 0};
    f.run(false);
  });
  return y;
}

template <typename T>
struct Backward {
  using A = Accumulate<T>;
  Shape s;
  const T *grad, *x;
  T* dx;
  const A *m, *q, *mean, *var, *group_mean, *inv_group_std;
  const Parameters<A>& parameters;
  double eps;
  bool through_statistics;
  A *d_batch_weight, *d_batch_bias, *d_weight, *d_bias;
  int64_t affine_size;
  Scratch<double> inv_std{s.channels}, gain{s.channels};
  Scratch<double> sums{4 * s.channels};                                        // per parameter
  Scratch<double> sum_g{s.samples * s.channels}, sum_gx{s.samples * s.channels};
  Scratch<double> mean_h{s.samples * s.groups}, mean_hz{s.samples * s.groups};
  // dx = p g + slope (x - m) + r
  Scratch<A> p{s.samples * s.channels}, slope{s.samples * s.channels}, r{s.samples * s.channels};

  void dots(int64_t n, int64_t g) {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_dots(grad + start, x + start, s.per_group, s.length, m + row, sum_g + row, sum_gx + row);
  }

  void group_stage(int64_t n, int64_t g) {
    const int64_t c = g * s.per_group, row = n * s.channels + c, group = n * s.groups + g;
    gradient_coefficients(
        m + row, mean + c, gain + c, parameters.at(g), group_mean[group], inv_group_std[group],
        sum_g + row, sum_gx + row, s.length, s.per_group, p + row, slope + row, r + row,
        mean_h + group, mean_hz + group);
  }

  // Gradients of the parameters of a group.
  void parameter_stage(int64_t g) {
    const int64_t c0 = g * s.per_group;
    double* d_bw = sums + 4 * c0;
    double *d_bb = d_bw + s.per_group, *d_w = d_bb + s.per_group, *d_b = d_w + s.per_group;
    std::fill_n(d_bw, 4 * s.per_group, 0.0);
    for (int64_t n = 0; n < s.samples; ++n) {
      const int64_t row = n * s.channels + c0, group = n * s.groups + g;
      add_parameter_gradients(
          m + row, q + row, mean + c0, gain + c0, inv_std + c0, parameters.at(g),
          group_mean[group], inv_group_std[group], sum_g + row, sum_gx + row, mean_h[group],
          mean_hz[group], s.length, s.per_group, d_bw, d_bb, d_w, d_b);
    }
    double group_weight = 0, group_bias = 0;
    for (int64_t i = 0, c = c0; i < s.per_group; ++i, ++c) {
      d_batch_weight[c] = static_cast<A>(d_bw[i]);
      d_batch_bias[c] = static_cast<A>(d_bb[i]);
      if (affine_size == s.channels) {
        d_weight[c] = static_cast<A>(d_w[i]);
        d_bias[c] = static_cast<A>(d_b[i]);
      }
      group_weight += d_w[i];
      group_bias += d_b[i];
    }
    if (affine_size == s.groups && affine_size != s.channels) {
      d_weight[g] = static_cast<A>(group_weight);
      d_bias[g] = static_cast<A>(group_bias);
    }
    if (!through_statistics) return;
    // BatchNorm's own two terms
    const double count = static_cast<double>(s.length) * s.samples;
    for (int64_t i = 0, c = c0; i < s.per_group; ++i, ++c) {
      const double towards_var = gain[c] * inv_std[c] * d_bw[i] / count;
      for (int64_t n = 0; n < s.samples; ++n) {
        const int64_t row = n * s.channels + c;
        slope[row] -= static_cast<A>(towards_var);
        r[row] -= static_cast<A>(
            gain[c] * d_bb[i] / count + towards_var * (static_cast<double>(m[row]) - mean[c]));
      }
    }
  }

  void gradient(int64_t n, int64_t g) {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_gradient(grad + start, x + start, dx + start, s.per_group, s.length, m + row, p + row,
                  slope + row, r + row);
  }

  void all_dots() {
    std::fill_n(static_cast<double*>(sum_g), s.samples * s.channels, 0.0);
    std::fill_n(static_cast<double*>(sum_gx), s.samples * s.channels, 0.0);
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
    // Of a single sample, a group's parameters are its own business.
    const bool with_group = s.samples == 1;
    const auto channels = [&](int64_t g) {
      const int64_t c = g * s.per_group;
      channel_gains(var + c, parameters.at(g).batch_weight, eps, s.per_group, inv_std + c,
                    gain + c);
    };
    const auto all_parameters = [&] {
      if (!with_group)
        parallel(s.groups, s.samples * s.per_group, [&](int64_t g) { parameter_stage(g); });
    };
    if (!with_group) parallel(s.groups, s.per_group, channels);
    if (s.rows && (with_group || !through_statistics)) {
      over_groups(s, [&](int64_t n, int64_t g) {
        if (with_group) channels(g);
        dots(n, g);
        group_stage(n, g);
        if (with_group) parameter_stage(g);
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
      parallel(s.samples * s.groups, s.per_group, [&](int64_t i) {
        if (with_group) channels(i);
        group_stage(i / s.groups, i % s.groups);
        if (with_group) parameter_stage(i);
      });
      all_parameters();
      over_chunks(s, [&](int64_t n, int64_t start, int64_t length, int64_t) {
        const int64_t row = n * s.channels;
        column_gradient(grad + start, x + start, dx + start, length, s.channels, m + row, p + row,
                        slope + row, r + row);
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
    const Parameters<A> parameters(
        batch_weight, batch_bias, weight, std::nullopt, channels, num_groups);
    Backward<scalar_t> b{
        Shape(x, num_groups), grad.const_data_ptr<scalar_t>(), x.const_data_ptr<scalar_t>(),
        dx.data_ptr<scalar_t>(), m.const_data_ptr<A>(), q.const_data_ptr<A>(),
        mean.const_data_ptr<A>(), var.const_data_ptr<A>(), group_mean.const_data_ptr<A>(),
        inv_group_std.const_data_ptr<A>(), parameters, eps, through_statistics,
        d_batch_weight.data_ptr<A>(), d_batch_bias.data_ptr<A>(), d_weight.data_ptr<A>(),
        d_bias.data_ptr<A>(), affine_size};
    b.run();
  });
  return {dx, d_batch_weight, d_batch_bias, d_weight, d_bias};
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CPU, library) {
  library.impl("row_moments", row_moments_op);
  library.impl("normalize_with_estimates", normalize_with_estimates);
  library.impl("evaluate", evaluate);
  library.impl("normalize", normalize);
  library.impl("normalize_backward", normalize_backward);
}

}  // namespace
}  // namespace wsbcn
