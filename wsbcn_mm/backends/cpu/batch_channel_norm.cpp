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
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "../nodes/carriers.h"
#include "../nodes/checks.h"
#include "groups.h"
#include "rows.h"

#define WSBCN_DISPATCH(dtype, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "wsbcn_mm", __VA_ARGS__)

namespace wsbcn {
namespace {

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

// The smallest number that becomes infinite in the dtype of a buffer.
double overflow(const Tensor& buffer) {
  switch (buffer.scalar_type()) {
    case at::kHalf:
      return 65520;
    case at::kBFloat16:
      return std::ldexp(511., 119);
    default:
      return std::numeric_limits<double>::infinity();  // an A has become infinite by itself
  }
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
    if (!is_there(source)) return;
    constexpr auto dtype = c10::CppTypeToScalarType<A>::value;
    const bool as_it_is = source->scalar_type() == dtype && source->is_contiguous();
    kept = as_it_is ? *source : source->contiguous().to(dtype);
    data = kept.const_data_ptr<A>();
  }
};

// The parameters of a call; `at(g)`: those of a group.
template <typename A>
struct Parameters {
  Values<A> batch_weight, batch_bias, weight, bias;
  int64_t per_group;
  bool per_channel;

  Parameters(const Affine& affine, int64_t channels, int64_t groups)
      : batch_weight(affine.batch_weight),
        batch_bias(affine.batch_bias),
        weight(expanded(affine.weight, affine.outer_size(), channels)),
        bias(expanded(affine.bias, affine.outer_size(), channels)),
        per_group(channels / groups),
        per_channel(affine.outer_size() == channels) {}

  GroupAffine<A> at(int64_t g) const {
    const int64_t c = g * per_group, outer = per_channel ? c : g;
    return {from(batch_weight, c), from(batch_bias, c), from(weight, outer), from(bias, outer),
            per_channel};
  }

 private:
  static const A* from(const Values<A>& values, int64_t i) {
    return values.data ? values.data + i : nullptr;
  }
  // One of scale and shift per channel, the other per group: both per channel.
  static OptionalTensor expanded(const OptionalTensor& values, int64_t size, int64_t channels) {
    if (!is_there(values) || values->numel() == size) return values;
    return values->repeat_interleave(channels / values->numel());
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
    step(n, (n * s.length + first) * s.channels, std::min(chunk, s.length - first), i * s.channels);
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

// What stage 1 normalises with: statistics that are given, the running ones after an update with x,
// or those of x.
enum class Source { given, estimates, batch };

// The running statistics as dense A, and what happens to them. Estimates are used as they are then:
// mean and var are the same memory.
template <typename A>
struct Update {
  A *mean = nullptr, *var = nullptr;
  int64_t* counts = nullptr;  // (2, C): samples taken in, updates left out
  double rate = 0;
  double limit = 0;  // the smallest number that the buffers cannot hold
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
  Source source = Source::given;
  Update<A> running{};
  Scratch<A> old{source == Source::given ? 0 : 2 * s.channels};
  Scratch<double> inv_std{s.channels}, gain{s.channels};
  // Space for either stage: threads may be in different ones.
  Scratch<double> of_channels{2 * s.channels}, of_rows{s.samples * s.channels};
  Scratch<A> scale{s.samples * s.channels}, shift{s.samples * s.channels};

  // Statistics of the channels of a group, updated before they are used.
  void channel_stage(int64_t g) {
    const int64_t c = g * s.per_group;
    if (source != Source::given) update(c);
    channel_gains(var + c, parameters.at(g).batch_weight, eps, s.per_group, inv_std + c, gain + c);
  }

  // Of the channels from `first` on.
  void update(int64_t first) {
    const GroupMoments<A> moments{m + first, q + first, s.samples, s.channels, s.per_group};
    std::copy_n(running.mean + first, s.per_group, old + first);
    std::copy_n(running.var + first, s.per_group, old + s.channels + first);
    double* sums = of_channels + 2 * first;
    if (source == Source::estimates) {
      update_channels(moments, running.rate, running.mean + first, running.var + first, sums);
    } else {
      batch_channels(moments, mean + first, var + first, sums);
      const double count = static_cast<double>(s.length) * s.samples, r = running.rate;
      for (int64_t c = first; c < first + s.per_group; ++c) {
        const double unbiased = static_cast<double>(var[c]) * count / (count - 1);
        running.mean[c] = static_cast<A>(old[c] + r * (mean[c] - static_cast<double>(old[c])));
        running.var[c] = static_cast<A>(old[s.channels + c] +
                                        r * (unbiased - static_cast<double>(old[s.channels + c])));
      }
    }
    keep_finite(first, first + s.per_group);
  }

  // Channels in which a running statistic would not be finite keep theirs.
  void keep_finite(int64_t first, int64_t last) const {
    for (int64_t c = first; c < last; ++c) {
      const bool finite = std::abs(running.mean[c]) < running.limit &&
                          std::abs(running.var[c]) < running.limit;  // not of a NaN
      if (!finite) {
        running.mean[c] = old[c];
        running.var[c] = old[s.channels + c];
      }
      if (running.counts != nullptr) {
        running.counts[finite ? c : s.channels + c] += finite ? s.samples : 1;
      }
    }
  }

  // Statistics of a group of a sample, and the coefficients of its rows.
  void group_stage(int64_t n, int64_t g) {
    const int64_t c = g * s.per_group, row = n * s.channels + c, i = n * s.groups + g;
    const Group<A> group{m + row,  q + row,          mean + c,   inv_std + c,
                         gain + c, parameters.at(g), s.per_group};
    group_coefficients(group, eps, {scale + row, shift + row, group_mean + i, inv_group_std + i},
                       of_rows + row);
  }

  void apply(int64_t n, int64_t g) const {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_affine(x + start, y + start, s.per_group, s.length, m + row, scale + row, shift + row);
  }

  void run(bool moments_are_there) {
    const Moments<T> moments{s, x, m, q};
    const bool over_samples = source != Source::given && s.samples > 1;
    if (s.rows && over_samples && s.per_group * s.length >= kColumnChunk / 2) {
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
    const bool first_pass = !moments_are_there && (!s.rows || over_samples);
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

Tensor like_statistics(const Tensor& x, at::IntArrayRef shape) {
  return at::empty(shape, x.options().dtype(accumulation_dtype(x)));
}

std::tuple<Tensor, Tensor> row_moments(const Tensor& input) {
  const Tensor x = checked_input(input, 1);
  Tensor m = like_statistics(x, {x.size(0), x.size(1)}), q = at::empty_like(m);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Shape shape(x, 1);
    Moments<scalar_t>{shape, x.const_data_ptr<scalar_t>(), m.data_ptr<A>(), q.data_ptr<A>()}
        .of_all();
  });
  return {m, q};
}

// As copy_, which takes longer than a small map.
void copy_values(const Tensor& from, const Tensor& to) {
  if (from.scalar_type() == to.scalar_type() && from.is_contiguous() && to.is_contiguous()) {
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  } else {
    to.copy_(from);
  }
}

Tensor copy_of(const Tensor& values, const Tensor& x) {
  Tensor result = like_statistics(x, values.sizes());
  copy_values(values, result);
  return result;
}

// The result and its statistics, not yet computed. The large tensor first: memory that lies at the
// end of the heap when it is freed is given back to the system, and costs a page fault per page
// when it is asked for again.
struct Results {
  Tensor y;
  Statistics statistics;

  Results(const Tensor& x, int64_t num_groups)
      : y(at::empty_like(x)),
        statistics{{}, {}, {}, {}, like_statistics(x, {x.size(0), num_groups}), {}} {
    statistics.inv_group_std = at::empty_like(statistics.group_mean);
  }
};

using Flat = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Both operators that see x, statistics and buffers in one call.
Flat normalize_with(Source source, const Tensor& input, int64_t num_groups, const Running& running,
                    const Affine& affine, const Rate& rate, double eps) {
  const Tensor x = checked_input(input, num_groups);
  check_running(running, x);
  check_affine(affine, x, num_groups);
  Results results(x, num_groups);
  auto& [m, q, mean, var, group_mean, inv_group_std] = results.statistics;
  m = like_statistics(x, {x.size(0), x.size(1)});
  q = at::empty_like(m);
  mean = copy_of(running.mean, x);
  var = copy_of(running.var, x);
  const Tensor new_mean = source == Source::batch ? copy_of(mean, x) : mean;
  const Tensor new_var = source == Source::batch ? copy_of(var, x) : var;
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Parameters<A> parameters(affine, x.size(1), num_groups);
    const Update<A> update{new_mean.data_ptr<A>(), new_var.data_ptr<A>(),
                           is_there(running.counts) ? running.counts->data_ptr<int64_t>() : nullptr,
                           rate.value(), std::min(overflow(running.mean), overflow(running.var))};
    Forward<scalar_t> f{Shape(x, num_groups),
                        x.const_data_ptr<scalar_t>(),
                        results.y.data_ptr<scalar_t>(),
                        m.data_ptr<A>(),
                        q.data_ptr<A>(),
                        mean.data_ptr<A>(),
                        var.data_ptr<A>(),
                        group_mean.data_ptr<A>(),
                        inv_group_std.data_ptr<A>(),
                        parameters,
                        eps,
                        source,
                        update};
    f.run(false);
  });
  if (source != Source::given) {
    copy_values(new_mean, running.mean);
    copy_values(new_var, running.var);
    if (is_there(running.num_batches_tracked)) {
      ++*running.num_batches_tracked->mutable_data_ptr<int64_t>();
    }
  }
  return {results.y, m, q, mean, var, group_mean, inv_group_std};
}

Flat normalize_with_estimates(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                              Tensor& running_var, const OptionalTensor& counts,
                              const OptionalTensor& num_batches_tracked,
                              const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                              const OptionalTensor& weight, const OptionalTensor& bias,
                              std::optional<double> rate, const OptionalTensor& rate_tensor,
                              double eps) {
  const Rate r{rate, rate_tensor};
  return normalize_with(r.is_given() ? Source::estimates : Source::given, x, num_groups,
                        {running_mean, running_var, counts, num_batches_tracked},
                        {batch_weight, batch_bias, weight, bias}, r, eps);
}

Flat normalize_with_batch(const Tensor& x, int64_t num_groups, Tensor& running_mean,
                          Tensor& running_var, const OptionalTensor& counts,
                          const OptionalTensor& num_batches_tracked,
                          const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
                          const OptionalTensor& weight, const OptionalTensor& bias,
                          std::optional<double> rate, const OptionalTensor& rate_tensor,
                          double eps) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.numel() > x.size(1),
                    "a batch needs two values per channel\n  got shape ", x.sizes());
  return normalize_with(Source::batch, x, num_groups,
                        {running_mean, running_var, counts, num_batches_tracked},
                        {batch_weight, batch_bias, weight, bias}, {rate, rate_tensor}, eps);
}

std::tuple<Tensor, Tensor, Tensor> normalize(const Tensor& input, int64_t num_groups,
                                             const Tensor& m, const Tensor& q, const Tensor& mean,
                                             const Tensor& var, const OptionalTensor& batch_weight,
                                             const OptionalTensor& batch_bias,
                                             const OptionalTensor& weight,
                                             const OptionalTensor& bias, double eps) {
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Tensor x = checked_input(input, num_groups);
  check_affine(affine, x, num_groups);
  Results results(x, num_groups);
  Statistics& statistics = results.statistics;
  statistics.m = m.contiguous();
  statistics.q = q.contiguous();
  statistics.mean = mean.contiguous();
  statistics.var = var.contiguous();
  check_statistics(statistics, x, num_groups);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Parameters<A> parameters(affine, x.size(1), num_groups);
    Forward<scalar_t> f{Shape(x, num_groups),
                        x.const_data_ptr<scalar_t>(),
                        results.y.data_ptr<scalar_t>(),
                        statistics.m.data_ptr<A>(),
                        statistics.q.data_ptr<A>(),
                        statistics.mean.data_ptr<A>(),
                        statistics.var.data_ptr<A>(),
                        statistics.group_mean.data_ptr<A>(),
                        statistics.inv_group_std.data_ptr<A>(),
                        parameters,
                        eps};
    f.run(true);
  });
  return {results.y, statistics.group_mean, statistics.inv_group_std};
}

// The result alone: nothing is copied and no statistics are kept.
Tensor evaluate(const Tensor& input, int64_t num_groups, const Tensor& running_mean,
                const Tensor& running_var, const OptionalTensor& counts,
                const OptionalTensor& num_batches_tracked, const OptionalTensor& batch_weight,
                const OptionalTensor& batch_bias, const OptionalTensor& weight,
                const OptionalTensor& bias, double eps) {
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Tensor x = checked_input(input, num_groups);
  check_running({running_mean, running_var, {}, {}}, x);  // the counters are not touched
  check_affine(affine, x, num_groups);
  Tensor y = at::empty_like(x);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Parameters<A> parameters(affine, x.size(1), num_groups);
    const Shape s(x, num_groups);
    const Scratch<A> m(s.samples * s.channels), q(s.samples * s.channels);
    const Scratch<A> group_mean(s.samples * s.groups), inv_group_std(s.samples * s.groups);
    const Values<A> mean(running_mean), var(running_var);
    // Without an update they are only read.
    Forward<scalar_t> f{s,
                        x.const_data_ptr<scalar_t>(),
                        y.data_ptr<scalar_t>(),
                        m,
                        q,
                        const_cast<A*>(mean.data),
                        const_cast<A*>(var.data),
                        group_mean,
                        inv_group_std,
                        parameters,
                        eps};
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
  int64_t outer_size;
  Scratch<double> inv_std{s.channels}, gain{s.channels};
  Scratch<double> sums{4 * s.channels};  // per parameter
  Scratch<double> sum_g{s.samples * s.channels}, sum_gx{s.samples * s.channels};
  Scratch<double> mean_h{s.samples * s.groups}, mean_hz{s.samples * s.groups};
  // dx = p g + slope (x - m) + r
  Scratch<A> p{s.samples * s.channels}, slope{s.samples * s.channels}, r{s.samples * s.channels};

  void dots(int64_t n, int64_t g) {
    const int64_t row = n * s.channels + g * s.per_group, start = row * s.length;
    rows_dots(grad + start, x + start, s.per_group, s.length, m + row, sum_g + row, sum_gx + row);
  }

  Group<A> group_of(int64_t n, int64_t g) const {
    const int64_t c = g * s.per_group, row = n * s.channels + c;
    return {m + row, q + row, mean + c, inv_std + c, gain + c, parameters.at(g), s.per_group};
  }

  GroupSums<A> sums_of(int64_t n, int64_t g) const {
    const int64_t row = n * s.channels + g * s.per_group, i = n * s.groups + g;
    return {group_mean[i], inv_group_std[i], sum_g + row, sum_gx + row,
            s.length,      mean_h + i,       mean_hz + i};
  }

  void group_stage(int64_t n, int64_t g) {
    const int64_t row = n * s.channels + g * s.per_group;
    gradient_coefficients(group_of(n, g), sums_of(n, g), {p + row, slope + row, r + row});
  }

  // Gradients of the parameters of a group.
  void parameter_stage(int64_t g) {
    const int64_t c0 = g * s.per_group;
    double* d_bw = sums + 4 * c0;
    double *d_bb = d_bw + s.per_group, *d_w = d_bb + s.per_group, *d_b = d_w + s.per_group;
    std::fill_n(d_bw, 4 * s.per_group, 0.0);
    for (int64_t n = 0; n < s.samples; ++n) {
      add_parameter_gradients(group_of(n, g), sums_of(n, g), {d_bw, d_bb, d_w, d_b});
    }
    double group_weight = 0, group_bias = 0;
    for (int64_t i = 0, c = c0; i < s.per_group; ++i, ++c) {
      d_batch_weight[c] = static_cast<A>(d_bw[i]);
      d_batch_bias[c] = static_cast<A>(d_bb[i]);
      if (outer_size == s.channels) {
        d_weight[c] = static_cast<A>(d_w[i]);
        d_bias[c] = static_cast<A>(d_b[i]);
      }
      group_weight += d_w[i];
      group_bias += d_b[i];
    }
    if (outer_size == s.groups && outer_size != s.channels) {
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
        r[row] -= static_cast<A>(gain[c] * d_bb[i] / count +
                                 towards_var * (static_cast<double>(m[row]) - mean[c]));
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
    const Tensor& grad, const Tensor& input, int64_t num_groups, const Tensor& m, const Tensor& q,
    const Tensor& mean, const Tensor& var, const Tensor& group_mean, const Tensor& inv_group_std,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps, bool through_statistics) {
  const Affine affine{batch_weight, batch_bias, weight, bias};
  const Statistics s{m.contiguous(),   q.contiguous(),          mean.contiguous(),
                     var.contiguous(), group_mean.contiguous(), inv_group_std.contiguous()};
  const Tensor x = checked_input(input, num_groups);
  check_affine(affine, x, num_groups);
  check_statistics(s, x, num_groups);
  check_gradient(grad, x);
  // Whatever layout comes: compiled code brings others than it was traced with.
  const Tensor g = grad.to(x.scalar_type()).contiguous(layout_of(x));
  Tensor dx = at::empty_like(x);
  Tensor d_batch_weight = at::empty({x.size(1)}, s.m.options());
  Tensor d_batch_bias = at::empty_like(d_batch_weight);
  Tensor d_weight = at::empty({affine.outer_size()}, s.m.options());
  Tensor d_bias = at::empty_like(d_weight);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const Parameters<A> parameters(affine, x.size(1), num_groups);
    Backward<scalar_t> b{Shape(x, num_groups),
                         g.const_data_ptr<scalar_t>(),
                         x.const_data_ptr<scalar_t>(),
                         dx.data_ptr<scalar_t>(),
                         s.m.const_data_ptr<A>(),
                         s.q.const_data_ptr<A>(),
                         s.mean.const_data_ptr<A>(),
                         s.var.const_data_ptr<A>(),
                         s.group_mean.const_data_ptr<A>(),
                         s.inv_group_std.const_data_ptr<A>(),
                         parameters,
                         eps,
                         through_statistics,
                         d_batch_weight.data_ptr<A>(),
                         d_batch_bias.data_ptr<A>(),
                         d_weight.data_ptr<A>(),
                         d_bias.data_ptr<A>(),
                         affine.outer_size()};
    b.run();
  });
  return {dx, d_batch_weight, d_batch_bias, d_weight, d_bias};
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CPU, library) {
  library.impl("row_moments", row_moments);
  library.impl("normalize_with_estimates", normalize_with_estimates);
  library.impl("normalize_with_batch", normalize_with_batch);
  library.impl("evaluate", evaluate);
  library.impl("normalize", normalize);
  library.impl("normalize_backward", normalize_backward);
}

TORCH_LIBRARY_IMPL(wsbcn_mm, CompositeExplicitAutograd, library) {
  library.impl("register_bytes", register_bytes);
}

}  // namespace
}  // namespace wsbcn
