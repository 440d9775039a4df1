#include "checks.h"

namespace wsbcn {
namespace {

void check_floating_beside(const Tensor& x, const Tensor& value, const char* name) {
  TORCH_CHECK_VALUE(value.device() == x.device(), name, " must be on the device of the input, ",
                    x.device(), "\n  got ", value.device());
  TORCH_CHECK_TYPE(value.is_floating_point(), name, " must be floating point\n  got ",
                   value.scalar_type());
}

void check_per_channel(const OptionalTensor& value, const char* name, const Tensor& x) {
  if (!is_there(value)) return;
  const int64_t channels = x.size(1);
  check_floating_beside(x, *value, name);
  TORCH_CHECK_VALUE(value->dim() == 1 && value->size(0) == channels, name, " must have shape (",
                    channels, ",), one value per channel\n  got shape ", value->sizes());
}

void check_per_group_or_channel(const OptionalTensor& value, const char* name, int64_t groups,
                                const Tensor& x) {
  if (!is_there(value)) return;
  const int64_t channels = x.size(1);
  check_floating_beside(x, *value, name);
  TORCH_CHECK_VALUE(value->dim() == 1 && (value->size(0) == groups || value->size(0) == channels),
                    name, " must have shape (", groups, ",), one value per group, or (", channels,
                    ",), one per channel\n  got shape ", value->sizes());
}

}  // namespace

at::ScalarType accumulation_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

Tensor checked_input(const Tensor& x, int64_t num_groups) {
  TORCH_CHECK_VALUE(x.dim() >= 2 && x.numel() > 0,
                    "x must be (N, C, *) and not empty\n  got shape ", x.sizes());
  TORCH_CHECK_VALUE(num_groups > 0 && x.size(1) % num_groups == 0,
                    "num_groups must divide the number of channels\n  got ", num_groups, " for ",
                    x.size(1), " channels");
  if (is_dense(x)) return x;
  if (x.stride(1) != 1 || x.dim() < 4 || x.dim() > 5) return x.contiguous();
  return x.contiguous(x.dim() == 4 ? at::MemoryFormat::ChannelsLast
                                   : at::MemoryFormat::ChannelsLast3d);
}

void check_running(const Running& running, const Tensor& x) {
  check_per_channel(running.mean, "running_mean", x);
  check_per_channel(running.var, "running_var", x);
  if (is_there(running.num_batches_tracked)) {
    const Tensor& tracked = *running.num_batches_tracked;
    TORCH_CHECK_VALUE(tracked.device() == x.device() && tracked.scalar_type() == at::kLong &&
                          tracked.numel() == 1,
                      "num_batches_tracked must be one int64 on ", x.device(), "\n  got ",
                      tracked.scalar_type(), " of shape ", tracked.sizes(), " on ",
                      tracked.device());
  }
  if (!is_there(running.counts)) return;
  const Tensor& counts = *running.counts;
  TORCH_CHECK_VALUE(counts.device() == x.device() && counts.scalar_type() == at::kLong &&
                        counts.sizes() == at::IntArrayRef({2, x.size(1)}) && counts.is_contiguous(),
                    "counts must be contiguous int64 of shape (2, ", x.size(1), ") on ", x.device(),
                    "\n  got ", counts.scalar_type(), " of shape ", counts.sizes(),
                    " with strides ", counts.strides(), " on ", counts.device());
}

void check_affine(const Affine& affine, const Tensor& x, int64_t num_groups) {
  check_per_channel(affine.batch_weight, "batch_weight", x);
  check_per_channel(affine.batch_bias, "batch_bias", x);
  check_per_group_or_channel(affine.weight, "weight", num_groups, x);
  check_per_group_or_channel(affine.bias, "bias", num_groups, x);
}

void check_statistic(const Tensor& value, const char* name, at::IntArrayRef shape,
                     const Tensor& x) {
  TORCH_CHECK_VALUE(value.device() == x.device() && value.scalar_type() == accumulation_dtype(x) &&
                        value.sizes() == shape,
                    name, " must be ", accumulation_dtype(x), " of shape ", shape, " on ",
                    x.device(), "\n  got ", value.scalar_type(), " of shape ", value.sizes(),
                    " on ", value.device());
}

void check_statistics(const Statistics& statistics, const Tensor& x, int64_t num_groups) {
  const int64_t samples = x.size(0), channels = x.size(1);
  check_statistic(statistics.m, "m", {samples, channels}, x);
  check_statistic(statistics.q, "q", {samples, channels}, x);
  check_statistic(statistics.mean, "mean", {channels}, x);
  check_statistic(statistics.var, "var", {channels}, x);
  check_statistic(statistics.group_mean, "group_mean", {samples, num_groups}, x);
  check_statistic(statistics.inv_group_std, "inv_group_std", {samples, num_groups}, x);
}

void check_gradient(const Tensor& grad, const Tensor& x) {
  TORCH_CHECK_VALUE(grad.device() == x.device() && grad.sizes() == x.sizes(),
                    "grad must have the shape and device of what it is the gradient of, ",
                    x.sizes(), " on ", x.device(), "\n  got shape ", grad.sizes(), " on ",
                    grad.device());
  TORCH_CHECK_TYPE(grad.is_floating_point(), "grad must be floating point\n  got ",
                   grad.scalar_type());
}

void check_weight(const Tensor& weight) {
  TORCH_CHECK_VALUE(weight.dim() >= 1 && weight.numel() > 0 && is_dense(weight),
                    "weight must be (O, *), contiguous or channels_last, not empty\n  got shape ",
                    weight.sizes(), " with strides ", weight.strides());
}

}  // namespace wsbcn
