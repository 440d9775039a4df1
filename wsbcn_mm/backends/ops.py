"""The contract of the fused kernels: what each operator computes, for every device that has one.

An operator is one call into a kernel library; C++ (`cpu/`) and Triton (`triton/`) supply them, and
`autograd` strings them together and differentiates. They are registered with torch under
``torch.ops.wsbcn_mm``, with shapes for ``torch.compile``, and know nothing of autograd.

Names: x is (N, C, *), contiguous or channels_last; a row is one (sample, channel) of it. G groups.
``m``, ``q`` (N, C): mean and biased variance of each row. ``mean``, ``var`` (C,): the statistics
of stage 1. ``group_mean``, ``inv_group_std`` (N, G): those of stage 2. All of these have the
accumulation dtype, float64 for float64 and float32 for everything else; parameters and buffers come
in any floating dtype. With ``gain[c] = batch_weight[c] / sqrt(var[c] + eps)``, row means
``t[n, c] = gain (m - mean) + batch_bias`` of x1, and the group of a channel understood::

    group_mean    = mean over the group of t
    group_var     = mean over the group of gain^2 q + (t - group_mean)^2
    inv_group_std = 1 / sqrt(group_var + eps)
    y             = weight inv_group_std (gain (x - m) + t - group_mean) + bias
"""

from collections.abc import Callable

import torch
from torch import Tensor

NAMESPACE = 'wsbcn_mm'

_library = torch.library.Library(NAMESPACE, 'DEF')

_library.define('row_moments(Tensor x) -> (Tensor m, Tensor q)')
# Estimate mode and evaluation, in one call. With `update` the running statistics are updated first,
# in place, at the rate `momentum`, or `rate` (0-d, any dtype, on the device of x or the CPU) where
# that is given:
#   running_mean <- (1 - r) running_mean + r mean(x)
#   running_var  <- (1 - r) running_var + r mean((x - old running_mean)^2)
# A channel in which one of them would not be finite, in the dtype of the buffers, keeps both.
# `counts` (2, C), contiguous int64, says so without anybody having to wait for it: the samples that
# entered a channel's statistics, and the updates that it left out, are added to its rows.
# `mean` and `var` are copies of what was then used.
_library.define(
    'normalize_with_estimates(Tensor x, int num_groups, Tensor(a!) running_mean, '
    'Tensor(b!) running_var, Tensor? batch_weight, Tensor? batch_bias, Tensor? weight, '
    'Tensor? bias, bool update, float momentum, Tensor? rate, float eps, '
    'Tensor(c!)? counts=None) -> '
    '(Tensor y, Tensor m, Tensor q, Tensor mean, Tensor var, Tensor group_mean, '
    'Tensor inv_group_std)'
)
# Evaluation when nothing is differentiated: the same without an update, y alone.
_library.define(
    'evaluate(Tensor x, int num_groups, Tensor running_mean, Tensor running_var, '
    'Tensor? batch_weight, Tensor? batch_bias, Tensor? weight, Tensor? bias, float eps) -> Tensor'
)
# The update alone, from the moments, for backends without a kernel of their own; returns copies. An
# operator, because a compiler may compute again for the backward pass what it can see into, and
# would do so with running statistics that have changed by then.
_library.define(
    'update_estimates(Tensor m, Tensor q, Tensor(a!) running_mean, Tensor(b!) running_var, '
    'float momentum, Tensor? rate, Tensor(c!)? counts=None) -> (Tensor mean, Tensor var)'
)
# Batch mode: the second half, after the moments were combined over samples (and ranks).
_library.define(
    'normalize(Tensor x, Tensor m, Tensor q, Tensor mean, Tensor var, int num_groups, '
    'Tensor? batch_weight, Tensor? batch_bias, Tensor? weight, Tensor? bias, float eps) -> '
    '(Tensor y, Tensor group_mean, Tensor inv_group_std)'
)
# grad has the dtype and layout of x. Gradients of x (likewise), batch_weight and batch_bias (C,),
# weight and bias (`affine_size`,): G, C, or 0 for none. With `through_statistics` mean and var are
# those of x itself (batch mode) and the gradient flows through them too.
_library.define(
    'normalize_backward(Tensor grad, Tensor x, Tensor m, Tensor q, Tensor mean, Tensor var, '
    'Tensor group_mean, Tensor inv_group_std, Tensor? batch_weight, Tensor? batch_bias, '
    'Tensor? weight, int num_groups, int affine_size, float eps, bool through_statistics) -> '
    '(Tensor, Tensor, Tensor, Tensor, Tensor)'
)
# weight (O, *), contiguous or channels_last: rows standardized into `dtype`, in the same layout.
# `mean`, `sigma` (O,): the row's mean and, by formula, 'paper' sqrt(var_biased + eps), 'var_eps'
# sqrt(var_unbiased + eps), 'std_eps' std_unbiased, to which eps is added before dividing.
_library.define(
    'standardize(Tensor weight, float eps, str formula, ScalarType dtype) -> '
    '(Tensor w_hat, Tensor mean, Tensor sigma)'
)
# grad has the layout of weight, in any floating dtype.
# dw = (g - mean(g)) / d - k (w - mean) sum((w - mean) g), d the denominator and, by formula,
# k = 1 / (n d^3), 1 / ((n - 1) d^3), 1 / ((n - 1) std d^2), the last one 0 where std is 0.
_library.define(
    'standardize_backward(Tensor grad, Tensor weight, Tensor mean, Tensor sigma, float eps, '
    'str formula) -> Tensor'
)
# The same for many weights of one dtype and device at once, into memory that the caller brings:
# `out[k]` lies as `weights[k]` does; `mean` and `sigma` hold the rows of all weights one after the
# other. Backward, `offsets[k]` is the place of the first row of `weights[k]` in them, and `out[k]`
# may be `grads[k]`.
_library.define(
    'standardize_all(Tensor[] weights, float eps, str formula, Tensor(a!)[] out, Tensor(b!) mean, '
    'Tensor(c!) sigma) -> ()'
)
_library.define(
    'standardize_all_backward(Tensor[] grads, Tensor[] weights, int[] offsets, Tensor mean, '
    'Tensor sigma, float eps, str formula, Tensor(a!)[] out) -> ()'
)

# The two operations as a whole, differentiable, for a backend that brings nodes of autograd's graph
# of its own (the CPU's, in C++): estimate mode and evaluation of a dense x that is not empty, and a
# dense weight. The others are differentiated by `autograd`.
_library.define(
    'batch_channel_norm(Tensor x, Tensor? batch_weight, Tensor? batch_bias, Tensor? weight, '
    'Tensor? bias, Tensor(a!) running_mean, Tensor(b!) running_var, int num_groups, bool update, '
    'float momentum, Tensor? rate, float eps, Tensor(c!)? counts=None) -> Tensor'
)
_library.define(
    'weight_standardize(Tensor weight, float eps, str formula, ScalarType dtype) -> Tensor'
)
# Many weights by one node, to whose graph a weight belongs only after `join`: see `together`.
_library.define(
    'weight_standardize_all(Tensor[] weights, float eps, str formula, ScalarType dtype) -> Tensor[]'
)
_library.define('join(Tensor w_hat, Tensor weight) -> ()')
# How often such a node has computed gradients, in the whole process.
_library.define('backward_calls() -> int')
# Frees the memory that a backend keeps for its next results.
_library.define('release_memory() -> ()')
# What such nodes call to be differentiated again: differentiable gradients of those inputs that
# require one, in order.
_library.define(
    'normalize_twice(Tensor grad, Tensor x, Tensor? batch_weight, Tensor? batch_bias, '
    'Tensor? weight, Tensor? bias, Tensor mean, Tensor var, int num_groups, float eps) -> Tensor[]'
)
_library.define('standardize_twice(Tensor grad, Tensor weight, float eps, str formula) -> Tensor')


def implement_twice(normalize_twice: Callable, standardize_twice: Callable) -> None:
    """Supplies `normalize_twice` and `standardize_twice` in operations that autograd knows."""
    _library.impl('normalize_twice', normalize_twice, 'CompositeImplicitAutograd')
    _library.impl('standardize_twice', standardize_twice, 'CompositeImplicitAutograd')


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)


def _rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


def _channels(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x.dtype))


def _groups(x: Tensor, num_groups: int) -> Tensor:
    return x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x.dtype))


@torch.library.register_fake(f'{NAMESPACE}::row_moments', lib=_library)
def _(x):
    return _rows(x), _rows(x)


@torch.library.register_fake(f'{NAMESPACE}::normalize_with_estimates', lib=_library)
def _(x, num_groups, *_):
    groups = (_groups(x, num_groups), _groups(x, num_groups))
    return torch.empty_like(x), _rows(x), _rows(x), _channels(x), _channels(x), *groups


@torch.library.register_fake(f'{NAMESPACE}::evaluate', lib=_library)
def _(x, *_):
    return torch.empty_like(x)


@torch.library.register_fake(f'{NAMESPACE}::update_estimates', lib=_library)
def _(m, *_):
    return m.new_empty(m.shape[1]), m.new_empty(m.shape[1])


def _update_estimates(m, q, running_mean, running_var, momentum, rate, counts=None):
    old_mean = running_mean.to(m.dtype)
    second_moment = (q + (m - old_mean).square()).mean(0)  # around the old mean
    rate = momentum if rate is None else rate
    return move_towards(m.mean(0), second_moment, running_mean, running_var, rate, counts, len(m))


def move_towards(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float | Tensor,
    counts: Tensor | None = None,
    samples: int = 0,
) -> tuple[Tensor, Tensor]:
    """Moves the buffers by ``rate`` towards ``mean`` and ``var``, in place.

    Args:
        mean: (C,), in the accumulation dtype.
        var: Likewise.
        running_mean: (C,), any floating dtype.
        running_var: Likewise.
        rate: 0 keeps the buffers, 1 replaces them; may be a 0-d tensor.
        counts: See above; None: nobody asks.
        samples: What is added to its first row.

    Returns:
        What the buffers now stand for, in the dtype of ``mean``.
    """
    old_mean, old_var = running_mean.to(mean.dtype), running_var.to(mean.dtype)
    rate = rate.to(mean.dtype) if isinstance(rate, Tensor) else rate
    mean, var = old_mean.lerp(mean, rate), old_var.lerp(var, rate)
    finite = mean.to(running_mean.dtype).isfinite() & var.to(running_var.dtype).isfinite()
    mean, var = mean.where(finite, old_mean), var.where(finite, old_var)
    running_mean.copy_(mean)
    running_var.copy_(var)
    if counts is not None:
        counts.add_(torch.stack([finite * samples, ~finite]))
    return mean, var


_library.impl('update_estimates', _update_estimates, 'CompositeExplicitAutograd')


@torch.library.register_fake(f'{NAMESPACE}::normalize', lib=_library)
def _(x, m, q, mean, var, num_groups, *_):
    return torch.empty_like(x), _groups(x, num_groups), _groups(x, num_groups)


@torch.library.register_fake(f'{NAMESPACE}::normalize_backward', lib=_library)
def _(
    grad,
    x,
    m,
    q,
    mean,
    var,
    group_mean,
    inv_group_std,
    batch_weight,
    batch_bias,
    weight,
    num_groups,
    affine_size,
    eps,
    through_statistics,
):
    outer = (m.new_empty(affine_size), m.new_empty(affine_size))
    return torch.empty_like(x), _channels(x), _channels(x), *outer


@torch.library.register_fake(f'{NAMESPACE}::standardize', lib=_library)
def _(weight, eps, formula, dtype):
    per_row = (weight.shape[0],)
    statistics = accumulation_dtype(weight.dtype)
    return (
        torch.empty_like(weight, dtype=dtype),
        weight.new_empty(per_row, dtype=statistics),
        weight.new_empty(per_row, dtype=statistics),
    )


@torch.library.register_fake(f'{NAMESPACE}::standardize_backward', lib=_library)
def _(grad, weight, mean, sigma, eps, formula):
    return torch.empty_like(weight)


@torch.library.register_fake(f'{NAMESPACE}::batch_channel_norm', lib=_library)
def _(x, *_):
    return torch.empty_like(x)


@torch.library.register_fake(f'{NAMESPACE}::weight_standardize', lib=_library)
def _(weight, eps, formula, dtype):
    return torch.empty_like(weight, dtype=dtype)


@torch.library.register_fake(f'{NAMESPACE}::standardize_all', lib=_library)
def _(*_):
    pass


@torch.library.register_fake(f'{NAMESPACE}::standardize_all_backward', lib=_library)
def _(*_):
    pass
