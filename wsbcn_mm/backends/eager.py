"""The operators of `ops` in plain torch calls, for every device and dtype torch knows.

Nothing here is differentiated by autograd: `autograd` does that with the operators' own backward.
Half precision is computed in float32, float64 in float64; results have the dtype of the input.
"""

import sys
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from wsbcn_mm import reference
from wsbcn_mm.backends import dispatched
from wsbcn_mm.backends.carriers import (
    Affine,
    AffineGradients,
    Rate,
    Running,
    Statistics,
    outer_size,
)
from wsbcn_mm.backends.ops import Kernels, accumulation_dtype
from wsbcn_mm.backends.running import update_from_batch

_THIS: ModuleType = sys.modules[__name__]


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return None


def supports(x: Tensor) -> str | None:
    """Why this backend cannot take ``x``, or None."""
    return None


def kernels() -> Kernels:
    """The operators of `wsbcn_mm.backends.ops`."""
    return cast(Kernels, _THIS)


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every row. Centred: E[x^2] - E[x]^2 fails at large means."""
    rows = _rows(x).to(accumulation_dtype(x.dtype))
    dims = list(range(2, rows.dim()))
    mean = rows.mean(dims)
    # Not torch.var_mean, which takes ten times as long on a CPU.
    return mean, (rows - _per_row(mean, rows)).square().mean(dims)


def normalize_with_estimates(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    """See `wsbcn_mm.backends.ops`, as for everything here."""
    m, q = row_moments(x)
    if rate is None:
        mean, var = running.mean.to(m.dtype, copy=True), running.var.to(m.dtype, copy=True)
    else:
        mean, var = dispatched.update_estimates(m, q, running, rate)
    y, group_mean, inv_group_std = normalize(x, num_groups, m, q, mean, var, affine, eps)
    return y, Statistics(m, q, mean, var, group_mean, inv_group_std)


def normalize_with_batch(
    x: Tensor, num_groups: int, running: Running, affine: Affine, rate: Rate, eps: float
) -> tuple[Tensor, Statistics]:
    m, q = row_moments(x)
    mean, var = update_from_batch(m, q, x.numel() // x.size(1), running, rate)
    y, group_mean, inv_group_std = normalize(x, num_groups, m, q, mean, var, affine, eps)
    return y, Statistics(m, q, mean, var, group_mean, inv_group_std)


def evaluate(x: Tensor, num_groups: int, running: Running, affine: Affine, eps: float) -> Tensor:
    return normalize_with_estimates(x, num_groups, running, affine, None, eps)[0]


def normalize(
    x: Tensor,
    num_groups: int,
    m: Tensor,
    q: Tensor,
    mean: Tensor,
    var: Tensor,
    affine: Affine,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inv_std = (var + eps).rsqrt()
    gain, t = _channel_stage(m, mean, inv_std, affine)
    group_mean = _over_group(t, num_groups)
    centred = t - _to_channels(group_mean, t)
    group_var = _over_group(gain.square() * q + centred.square(), num_groups)
    inv_group_std = (group_var + eps).rsqrt()
    scale = _to_channels(inv_group_std, t)
    if affine.weight is not None:
        scale = scale * reference.expand_groups(affine.weight.to(t.dtype), t.size(1))
    shift = scale * centred
    if affine.bias is not None:
        shift = shift + reference.expand_groups(affine.bias.to(t.dtype), t.size(1))
    rows = _rows(x)
    # Not in place: see `_cast`.
    centred_rows = rows - _per_row(m, rows)
    y = torch.addcmul(_per_row(shift, rows), centred_rows, _per_row(scale * gain, rows))
    y = _cast(y, x.dtype)
    if x.dim() == 2:  # not a view: an in-place ReLU and reentrant checkpointing reject it
        y = y.squeeze(-1).clone()
    return y, group_mean, inv_group_std


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    statistics: Statistics,
    affine: Affine,
    eps: float,
    through_statistics: bool,
) -> tuple[Tensor, AffineGradients]:
    m, q, mean, var, group_mean, inv_group_std = statistics
    length = x[0, 0].numel()
    rows, g = _rows(x), _rows(grad).to(m.dtype)
    dims = list(range(2, rows.dim()))
    inv_std = (var + eps).rsqrt()
    s = _to_channels(inv_group_std, m)
    gain, t = _channel_stage(m, mean, inv_std, affine)
    t = t - _to_channels(group_mean, m)  # row mean of x1, centred in its group

    centred = rows - _per_row(m, rows)
    sum_g = g.sum(dims)
    sum_gx = (g * centred).sum(dims)
    sum_gz = s * (gain * sum_gx + t * sum_g)  # z: the normalised x1, before the outer affine

    # Outer affine and group stage: dx1 = s (h - mean(h) - z mean(h z)), h = weight * grad, the
    # means over a group. Its row sums alone and against (x - m) give the rest.
    if affine.weight is None:
        outer = torch.ones_like(m[:1])
    else:
        outer = reference.expand_groups(affine.weight.to(m.dtype), m.size(1))
    mean_h = _to_channels(_over_group(outer * sum_g, num_groups), m) / length
    mean_hz = _to_channels(_over_group(outer * sum_gz, num_groups), m) / length
    sum_dx1 = s * (outer * sum_g - length * (mean_h + s * mean_hz * t))
    sum_dx1_x = s * (outer * sum_gx - s * mean_hz * gain * length * q)
    grad_batch_bias = sum_dx1.sum(0)
    grad_batch_weight = ((sum_dx1_x + (m - mean) * sum_dx1) * inv_std).sum(0)

    p = gain * s * outer
    slope = -((gain * s).square()) * mean_hz
    r = -gain * s * (mean_h + s * mean_hz * t)
    if through_statistics:  # BatchNorm's own two terms
        count = x.numel() // x.size(1)
        towards_var = gain * inv_std * grad_batch_weight / count
        slope = slope - towards_var
        r = r - gain * grad_batch_bias / count - towards_var * (m - mean)
    # In place: `centred` becomes dx, no further full-size tensor is kept.
    grad_x = centred.mul_(_per_row(slope, rows)).add_(_per_row(r, rows))
    grad_x = grad_x.add_(g * _per_row(p, rows)).to(x.dtype).view_as(x)

    size = outer_size(affine)

    def outer_sum(values: Tensor) -> Tensor:
        return values.sum(0).view(size, -1).sum(1) if size else m.new_empty(0)

    gradients = AffineGradients(
        grad_batch_weight, grad_batch_bias, outer_sum(sum_gz), outer_sum(sum_g)
    )
    return grad_x, gradients


def standardize(
    weight: Tensor, eps: float, formula: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    w = weight.to(accumulation_dtype(weight.dtype))
    dims, per_row = list(range(1, w.dim())), (-1, *[1] * (w.dim() - 1))
    mean = w.mean(dims)
    w = w - mean.view(per_row)
    w = w - w.mean(dims, keepdim=True)  # what the mean lost when it was rounded
    freedom = weight[0].numel() - (0 if formula == 'paper' else 1)
    variance = w.square().sum(dims) / freedom
    sigma = variance.sqrt() if formula == 'std_eps' else (variance + eps).sqrt()
    # Not in place: see `_cast`.
    return _cast(w / _denominator(sigma, eps, formula).view(per_row), dtype), mean, sigma


def standardize_all(
    weights: list[Tensor],
    eps: float,
    formula: str,
    out: list[Tensor],
    mean: Tensor,
    sigma: Tensor,
) -> None:
    first = 0
    for weight, result in zip(weights, out):
        rows = slice(first, first := first + len(weight))
        w_hat, mean[rows], sigma[rows] = standardize(weight, eps, formula, result.dtype)
        result.copy_(w_hat)


def standardize_all_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    offsets: list[int],
    mean: Tensor,
    sigma: Tensor,
    eps: float,
    formula: str,
    out: list[Tensor],
) -> None:
    for grad, weight, first, result in zip(grads, weights, offsets, out):
        rows = slice(first, first + len(weight))
        result.copy_(standardize_backward(grad, weight, mean[rows], sigma[rows], eps, formula))


def standardize_backward(
    grad: Tensor, weight: Tensor, mean: Tensor, sigma: Tensor, eps: float, formula: str
) -> Tensor:
    w = weight.flatten(1).to(mean.dtype) - mean[:, None]
    w = w.sub_(w.mean(1, keepdim=True))
    g = grad.flatten(1).to(mean.dtype)
    denominator = _denominator(sigma, eps, formula)
    freedom = w.size(1) if formula == 'paper' else w.size(1) - 1
    k = 1 / (freedom * sigma * denominator.square())
    k = k.where(sigma > 0, 0)  # the standard deviation of a constant row has no gradient
    dots = (g * w).sum(1)
    g = (g - g.mean(1, keepdim=True)).div_(denominator[:, None])
    g = g.sub_(w.mul_((k * dots)[:, None]))
    return torch.empty_like(weight).copy_(g.view(weight.shape))


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`Tensor.to`, but for a result that has the dtype already.

    torch 2.11 compiles the gradient of a custom function to zeros where the function returns what
    an operation returned as it got it: `to` without a change, or one in place.
    """
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _denominator(sigma: Tensor, eps: float, formula: str) -> Tensor:
    return sigma + eps if formula == 'std_eps' else sigma


def _channel_stage(
    m: Tensor, mean: Tensor, inv_std: Tensor, affine: Affine
) -> tuple[Tensor, Tensor]:
    """Stage 1, x1 = gain (x - mean) + batch_bias: its gain (C,) and the row means of x1 (N, C)."""
    gain = inv_std
    if affine.batch_weight is not None:
        gain = affine.batch_weight.to(inv_std.dtype) * inv_std
    t = gain * (m - mean)
    return gain, t if affine.batch_bias is None else t + affine.batch_bias.to(t.dtype)


def _over_group(values: Tensor, num_groups: int) -> Tensor:
    """(N, C) to (N, G): the mean over each group's channels."""
    return values.view(values.size(0), num_groups, -1).mean(2)


def _to_channels(values: Tensor, like: Tensor) -> Tensor:
    """(N, G) to (N, C): each group's value once per channel of the group."""
    return values.repeat_interleave(like.size(1) // values.size(1), dim=1)


def _rows(x: Tensor) -> Tensor:
    """X with at least one axis after (N, C); a view, in any memory format."""
    return x.unsqueeze(-1) if x.dim() == 2 else x


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    """(N, C) shaped to broadcast against rows (N, C, *)."""
    return values.view(*values.shape, *[1] * (rows.dim() - 2))
