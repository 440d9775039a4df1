// Batch-Channel Normalization on the CPU; the contract and the formulas stand in backends/ops.py.
//
// Everything a group needs is in the group: its rows of x, in all samples. So with rows in memory
// (NCHW) one thread takes one group through moments, algebra and result while its rows are in the
// cache, and x is read from memory once. With channels_last, or more threads than groups, the three
// steps are three parallel loops over the whole tensor.
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
    const int64_t repeat = channels / dense.numel();
    WSBCN_DISPATCH(dense.scalar_type(), [&] {
      const scalar_t* source = dense.const_data_ptr<scalar_t>();
      for (int64_t c = 0; c < channels; ++c) result[c] = static_cast<double>(source[c / repeat]);
    });
  }
  return result;
}

// Runs the three steps of a pass. `first(n, c)` and `last(n, c)` treat one row, `algebra(g)` one
// group; `first_chunk(n, k)` and `last_chunk(n, k)` treat chunk k of sample n in channels_last, and
// `merge(n)` joins what the chunks of a sample found.
template <typename First, typename Algebra, typename Last, typename FirstChunk, typename Merge,
          typename LastChunk>
void run(const Shape& s, const First& first, const Algebra& algebra, const Last& last,
         const FirstChunk& first_chunk, const Merge& merge, const LastChunk& last_chunk) {
  if (!s.rows) {
    const int64_t chunks = s.chunks(), all = s.samples * chunks;
    const int64_t grain = std::max<int64_t>(1, kGrain / (s.chunk() * s.channels));
    at::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) first_chunk(i / chunks, i % chunks);
    });
    for (int64_t n = 0; n < s.samples; ++n) merge(n);
    for (int64_t g = 0; g < s.groups; ++g) algebra(g);
    at::parallel_for(0, all, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) last_chunk(i / chunks, i % chunks);
    });
    return;
  }
  const int64_t per_group = s.samples * s.per_group * s.length;
  const int64_t threads = at::get_num_threads();
  if (s.groups % threads == 0 || s.groups >= 4 * threads || per_group * s.groups < kGrain) {
    at::parallel_for(0, s.groups, std::max<int64_t>(1, kGrain / per_group),
                     [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t c0 = g * s.per_group, c1 = c0 + s.per_group;
        for (int64_t n = 0; n < s.samples; ++n)
          for (int64_t c = c0; c < c1; ++c) first(n, c);
        algebra(g);
        for (int64_t n = 0; n < s.samples; ++n)
          for (int64_t c = c0; c < c1; ++c) last(n, c);
      }
    });
    return;
  }
  const auto over_rows = [&](const auto& step) {
    at::parallel_for(0, s.samples * s.channels, std::max<int64_t>(1, kGrain / s.length),
                     [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) step(i / s.channels, i % s.channels);
    });
  };
  over_rows(first);
  for (int64_t g = 0; g < s.groups; ++g) algebra(g);
  over_rows(last);
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
  std::vector<A> scale, shift;  // (N, C)

  void moments(int64_t n, int64_t c) const {
    const int64_t row = n * s.channels + c;
    double centre, squares;
    row_moments(x + row * s.length, s.length, &centre, &squares);
    m[row] = static_cast<A>(centre);
    q[row] = static_cast<A>(squares / s.length);
  }

  void update_estimates(int64_t c) const {
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

  void algebra(int64_t g) {
    const int64_t c0 = g * s.per_group, c1 = c0 + s.per_group;
    if (update)
      for (int64_t c = c0; c < c1; ++c) update_estimates(c);
    std::vector<double> gain(s.per_group), t(s.per_group);  // of stage 1; row means of x1
    for (int64_t c = c0; c < c1; ++c) gain[c - c0] = batch_weight[c] / std::sqrt(var[c] + eps);
    for (int64_t n = 0; n < s.samples; ++n) {
      const int64_t row = n * s.channels;
      double centre = 0, square = 0;
      for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
        t[i] = gain[i] * (static_cast<double>(m[row + c]) - mean[c]) + batch_bias[c];
        centre += t[i];
      }
      centre /= s.per_group;
      for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
        square += gain[i] * gain[i] * q[row + c] + (t[i] - centre) * (t[i] - centre);
      }
      const double inverse = 1 / std::sqrt(square / s.per_group + eps);
      group_mean[n * s.groups + g] = static_cast<A>(centre);
      inv_group_std[n * s.groups + g] = static_cast<A>(inverse);
      for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
        scale[row + c] = static_cast<A>(weight[c] * inverse * gain[i]);
        shift[row + c] = static_cast<A>(weight[c] * inverse * (t[i] - centre) + bias[c]);
      }
    }
  }

  void run_all(bool moments_are_there) {
    scale.resize(s.samples * s.channels);
    shift.resize(s.samples * s.channels);
    std::vector<A> means, squares;
    if (!s.rows && !moments_are_there) {
      means.resize(s.samples * s.chunks() * s.channels);
      squares.resize(means.size());
    }
    const auto nothing = [](auto...) {};
    const auto last = [&](int64_t n, int64_t c) {
      const int64_t i = n * s.channels + c;
      row_affine(x + i * s.length, y + i * s.length, s.length, m[i], scale[i], shift[i]);
    };
    const auto last_chunk = [&](int64_t n, int64_t k) {
      const int64_t start = (n * s.length + k * s.chunk()) * s.channels, row = n * s.channels;
      column_affine(x + start, y + start, std::min(s.chunk(), s.length - k * s.chunk()),
                    s.channels, m + row, scale.data() + row, shift.data() + row);
    };
    const auto step = [&](int64_t g) { algebra(g); };
    if (moments_are_there) {
      run(s, nothing, step, last, nothing, nothing, last_chunk);
    } else {
      run(s, [&](int64_t n, int64_t c) { moments(n, c); }, step, last, chunk_moments(means, squares),
          merged(means, squares), last_chunk);
    }
  }

  auto chunk_moments(std::vector<A>& means, std::vector<A>& squares) {
    return [&](int64_t n, int64_t k) {
      const int64_t start = (n * s.length + k * s.chunk()) * s.channels;
      const int64_t slot = (n * s.chunks() + k) * s.channels;
      column_moments(x + start, std::min(s.chunk(), s.length - k * s.chunk()), s.channels,
                     means.data() + slot, squares.data() + slot);
    };
  }

  auto merged(std::vector<A>& means, std::vector<A>& squares) {
    return [&](int64_t n) {
      const int64_t slot = n * s.chunks() * s.channels, row = n * s.channels;
      merge_moments(s, means.data() + slot, squares.data() + slot, m + row, q + row);
    };
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
    std::vector<A> means, squares;
    if (!f.s.rows) {
      means.resize(f.s.samples * f.s.chunks() * f.s.channels);
      squares.resize(means.size());
    }
    const auto nothing = [](auto...) {};
    run(f.s, [&](int64_t n, int64_t c) { f.moments(n, c); }, nothing, nothing,
        f.chunk_moments(means, squares), f.merged(means, squares), nothing);
  });
  return {m, q};
}

std::tuple<Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& m, const Tensor& q, bool moments_are_there, const Tensor& mean,
    const Tensor& var, int64_t num_groups, const OptionalTensor& batch_weight,
    const OptionalTensor& batch_bias, const OptionalTensor& weight, const OptionalTensor& bias,
    bool update, double rate, double eps) {
  Tensor y = at::empty_like(x);
  Tensor group_mean = at::empty({x.size(0), num_groups}, m.options());
  Tensor inv_group_std = at::empty_like(group_mean);
  WSBCN_DISPATCH(x.scalar_type(), [&] {
    using A = Accumulate<scalar_t>;
    const int64_t channels = x.size(1);
    Forward<scalar_t> f{
        Shape(x, num_groups), x.const_data_ptr<scalar_t>(), y.data_ptr<scalar_t>(),
        m.data_ptr<A>(), q.data_ptr<A>(), mean.data_ptr<A>(), var.data_ptr<A>(),
        group_mean.data_ptr<A>(), inv_group_std.data_ptr<A>(),
        per_channel(batch_weight, channels, 1), per_channel(batch_bias, channels, 0),
        per_channel(weight, channels, 1), per_channel(bias, channels, 0), eps, update, rate};
    f.run_all(moments_are_there);
  });
  return {y, group_mean, inv_group_std};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> normalize_with_estimates(
    const Tensor& x, int64_t num_groups, Tensor& running_mean, Tensor& running_var,
    const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, bool update, double momentum,
    const OptionalTensor& rate, double eps) {
  check_layout(x);
  const auto options = x.options().dtype(accumulation(x));
  Tensor m = at::empty({x.size(0), x.size(1)}, options), q = at::empty_like(m);
  Tensor mean = at::empty({x.size(1)}, options).copy_(running_mean);
  Tensor var = at::empty({x.size(1)}, options).copy_(running_var);
  const double r = rate.has_value() ? rate->item<double>() : momentum;
  auto [y, group_mean, inv_group_std] = forward(
      x, m, q, false, mean, var, num_groups, batch_weight, batch_bias, weight, bias, update, r,
      eps);
  if (update) {
    running_mean.copy_(mean);
    running_var.copy_(var);
  }
  return {y, m, q, mean, var, group_mean, inv_group_std};
}

std::tuple<Tensor, Tensor, Tensor> normalize(
    const Tensor& x, const Tensor& m, const Tensor& q, const Tensor& mean, const Tensor& var,
    int64_t num_groups, const OptionalTensor& batch_weight, const OptionalTensor& batch_bias,
    const OptionalTensor& weight, const OptionalTensor& bias, double eps) {
  check_layout(x);
  return forward(x, m.contiguous(), q.contiguous(), true, mean.contiguous(), var.contiguous(),
                 num_groups, batch_weight, batch_bias, weight, bias, false, 0, eps);
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
  std::vector<double> sum_g, sum_gx;   // (N, C)
  std::vector<A> p, slope, r;          // (N, C): dx = p g + slope (x - m) + r

  void algebra(int64_t g) {
    const int64_t c0 = g * s.per_group, c1 = c0 + s.per_group;
    const double length = static_cast<double>(s.length), group_length = length * s.per_group;
    std::vector<double> d_bw(s.per_group), d_bb(s.per_group), d_w(s.per_group), d_b(s.per_group);
    std::vector<double> inv_std(s.per_group), gain(s.per_group), t(s.per_group);
    for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
      inv_std[i] = 1 / std::sqrt(var[c] + eps);
      gain[i] = batch_weight[c] * inv_std[i];
    }
    for (int64_t n = 0; n < s.samples; ++n) {
      const int64_t row = n * s.channels;
      const double inverse = inv_group_std[n * s.groups + g];
      double mean_h = 0, mean_hz = 0;
      for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
        // Row mean of x1, centred in its group; z is the normalised x1, before the outer affine.
        t[i] = gain[i] * (static_cast<double>(m[row + c]) - mean[c]) + batch_bias[c] -
            group_mean[n * s.groups + g];
        const double sum_gz = inverse * (gain[i] * sum_gx[row + c] + t[i] * sum_g[row + c]);
        d_b[i] += sum_g[row + c];
        d_w[i] += sum_gz;
        mean_h += weight[c] * sum_g[row + c];
        mean_hz += weight[c] * sum_gz;
      }
      mean_h /= group_length;
      mean_hz /= group_length;
      // dx1 = inverse (h - mean(h) - z mean(h z)) with h = weight g; its row sums give the rest.
      for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
        const double offset = mean_h + inverse * mean_hz * t[i];
        const double sum_dx1 = inverse * (weight[c] * sum_g[row + c] - length * offset);
        const double sum_dx1_x = inverse *
            (weight[c] * sum_gx[row + c] - inverse * mean_hz * gain[i] * length * q[row + c]);
        d_bb[i] += sum_dx1;
        d_bw[i] +=
            (sum_dx1_x + (static_cast<double>(m[row + c]) - mean[c]) * sum_dx1) * inv_std[i];
        p[row + c] = static_cast<A>(gain[i] * inverse * weight[c]);
        slope[row + c] = static_cast<A>(-gain[i] * gain[i] * inverse * inverse * mean_hz);
        r[row + c] = static_cast<A>(-gain[i] * inverse * offset);
      }
    }
    for (int64_t i = 0, c = c0; c < c1; ++i, ++c) {
      d_batch_weight[c] = static_cast<A>(d_bw[i]);
      d_batch_bias[c] = static_cast<A>(d_bb[i]);
      if (affine_size == s.channels) {
        d_weight[c] = static_cast<A>(d_w[i]);
        d_bias[c] = static_cast<A>(d_b[i]);
      } else if (i > 0) {
        d_w[0] += d_w[i];
        d_b[0] += d_b[i];
      }
      if (!through_statistics) continue;
      // BatchNorm's own two terms
      const double count = length * s.samples, towards_var = gain[i] * inv_std[i] * d_bw[i] / count;
      for (int64_t n = 0; n < s.samples; ++n) {
        const int64_t row = n * s.channels + c;
        slope[row] -= static_cast<A>(towards_var);
        r[row] -= static_cast<A>(
            gain[i] * d_bb[i] / count + towards_var * (static_cast<double>(m[row]) - mean[c]));
      }
    }
    if (affine_size == s.groups && affine_size != s.channels) {
      d_weight[g] = static_cast<A>(d_w[0]);
      d_bias[g] = static_cast<A>(d_b[0]);
    }
  }

  void run_all() {
    const int64_t all = s.samples * s.channels, slots = s.samples * s.chunks() * s.channels;
    for (auto* values : {&sum_g, &sum_gx}) values->resize(all);
    for (auto* values : {&p, &slope, &r}) values->resize(all);
    std::vector<A> parts_g(s.rows ? 0 : slots), parts_gx(s.rows ? 0 : slots);
    run(
        s,
        [&](int64_t n, int64_t c) {
          const int64_t i = n * s.channels + c;
          row_dots(grad + i * s.length, x + i * s.length, s.length, m[i], &sum_g[i], &sum_gx[i]);
        },
        [&](int64_t g) { algebra(g); },
        [&](int64_t n, int64_t c) {
          const int64_t i = n * s.channels + c, start = i * s.length;
          row_gradient(grad + start, x + start, dx + start, s.length, m[i], p[i], slope[i], r[i]);
        },
        [&](int64_t n, int64_t k) {
          const int64_t start = (n * s.length + k * s.chunk()) * s.channels;
          const int64_t slot = (n * s.chunks() + k) * s.channels;
          column_dots(grad + start, x + start, std::min(s.chunk(), s.length - k * s.chunk()),
                      s.channels, m + n * s.channels, parts_g.data() + slot,
                      parts_gx.data() + slot);
        },
        [&](int64_t n) {
          for (int64_t k = 0; k < s.chunks(); ++k) {
            const int64_t slot = (n * s.chunks() + k) * s.channels;
            for (int64_t c = 0; c < s.channels; ++c) {
              sum_g[n * s.channels + c] += parts_g[slot + c];
              sum_gx[n * s.channels + c] += parts_gx[slot + c];
            }
          }
        },
        [&](int64_t n, int64_t k) {
          const int64_t start = (n * s.length + k * s.chunk()) * s.channels, row = n * s.channels;
          column_gradient(grad + start, x + start, dx + start,
                          std::min(s.chunk(), s.length - k * s.chunk()), s.channels, m + row,
                          p.data() + row, slope.data() + row, r.data() + row);
        });
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
    b.run_all();
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
