"""Both operations in plain torch calls, for every device and dtype torch knows.

BCN: stage 1 is a per-channel affine map of x, so the first two moments of x per (sample, channel)
give the statistics of both stages in closed form. One pass over x for the moments, (N, C) algebra,
one pass for ``y = A[n, c] (x - mean[n, c]) + B[n, c]``. The backward needs the row sums of g and
g (x - mean), (N, C) algebra, and one pass ``dx = P g + Q (x - mean) + R``. Of full-size tensors
only x is saved for backward: together with an in-place ReLU twice the input, as with BatchNorm or
GroupNorm.

The algebra is ours; it is checked against `wsbcn_mm.reference`, gradients and buffers included.
Half precision is computed in float32, float64 in float64; results have the dtype of the input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wsbcn_mm import reference


def weight_standardize(weight: Tensor, eps: float, formula: str) -> Tensor:
    """See `wsbcn_mm.functional.weight_standardize`; the arguments were checked there."""
    w = weight.to(compute_dtype(weight.dtype))
    if formula == 'std_eps':
        w = reference.weight_standardize(w, eps, formula)
    else:
        # One batch_norm call over (1, O, n): two passes each way instead of the dozen that the
        # formula takes when it is written out. It divides by sqrt(var_biased + eps).
        scale = None
        if formula == 'var_eps':
            # sqrt(var_unbiased + eps) = sqrt(n / (n - 1)) * sqrt(var_biased + eps (n - 1) / n)
            shrink = 1 - 1 / weight[0].numel()
            scale, eps = w.new_full((w.size(0),), shrink**0.5), eps * shrink
        w = F.batch_norm(w.reshape(1, w.size(0), -1), None, None, scale, training=True, eps=eps)
    return w.reshape(weight.shape).to(weight.dtype)


def batch_channel_norm(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    mode: str,
    momentum: float | Tensor,
    eps: float,
) -> Tensor:
    """See `wsbcn_mm.functional.batch_channel_norm`; the arguments were checked there."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        dtype = compute_dtype(x.dtype)
        # Copies: the buffers may change before the backward pass of this call.
        mean, var = running_mean.to(dtype, copy=True), running_var.to(dtype, copy=True)
        count = x.numel() // x.size(1)
        # An empty x says nothing about the channels. A single value per channel has no variance:
        # where BatchNorm raises (image pooling at one image), the running statistics are used.
        differentiate_statistics = training and mode == 'batch' and count > 1
        m, q = row_moments(x)
        if differentiate_statistics:
            batch_mean = m.mean(0)
            batch_var = (q + (m - batch_mean).square()).mean(0)
            running_mean.copy_(mean.lerp(batch_mean, _as_weight(momentum, mean)))
            unbiased = batch_var * (count / (count - 1))
            running_var.copy_(var.lerp(unbiased, _as_weight(momentum, var)))
            mean, var = batch_mean, batch_var
        elif training and mode == 'estimate' and count > 0:
            second_moment = (q + (m - mean).square()).mean(0)  # around the old mean
            mean = mean.lerp(m.mean(0), _as_weight(momentum, mean))
            var = var.lerp(second_moment, _as_weight(momentum, var))
            running_mean.copy_(mean)
            running_var.copy_(var)
    return _Normalize.apply(
        x, batch_weight, batch_bias, weight, bias, m, q, mean, var, num_groups, eps,
        differentiate_statistics,
    )  # fmt: skip


def row_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every (sample, channel) row of x: (N, C) each.

    Centred, not E[x^2] - E[x]^2: at mean 1000 the latter is wrong by a quarter in float32.
    """
    rows = _rows(x).to(compute_dtype(x.dtype))
    dims = list(range(2, rows.dim()))
    mean = rows.mean(dims)
    # Not torch.var_mean, which takes ten times as long on a CPU.
    return mean, (rows - _per_row(mean, rows)).square_().mean(dims)


class _Normalize(torch.autograd.Function):
    """Both stages with given channel statistics: `reference.normalize` and its gradient.

    With ``differentiate_statistics`` the given mean and var are those of x itself and the gradient
    flows through them (batch mode); otherwise they are constants.
    """

    @staticmethod
    def forward(
        ctx, x, batch_weight, batch_bias, weight, bias, m, q, mean, var, num_groups, eps,
        differentiate_statistics,
    ):  # fmt: skip
        with torch.autocast(x.device.type, enabled=False):
            inv_std = (var + eps).rsqrt()  # (C,)
            gain, t = _channel_stage(m, mean, inv_std, batch_weight, batch_bias)
            group_mean = _group_mean(t, num_groups)  # (N, C), equal within a group
            group_var = _group_mean(gain.square() * q + (t - group_mean).square(), num_groups)
            inv_group_std = (group_var + eps).rsqrt()
            outer = _to_channels(weight, m)
            scale = inv_group_std if outer is None else outer * inv_group_std
            shift = scale * (t - group_mean)
            if bias is not None:
                shift = shift + _to_channels(bias, m)
            rows = _rows(x)
            y = (rows - _per_row(m, rows)).mul_(_per_row(scale * gain, rows))
            y = y.add_(_per_row(shift, rows)).to(x.dtype)
            if x.dim() == 2:  # not a view: an in-place ReLU and reentrant checkpointing reject it
                y = y.squeeze(-1).clone()
        ctx.save_for_backward(
            x, batch_weight, batch_bias, weight, bias, m, q, mean, inv_std, group_mean,
            inv_group_std, var,
        )  # fmt: skip
        ctx.num_groups, ctx.eps = num_groups, eps
        ctx.differentiate_statistics = differentiate_statistics
        return y

    @staticmethod
    def backward(ctx, grad):
        if grad.numel() == 0:
            # Zeros, not None: DistributedDataParallel waits for every parameter's gradient.
            inputs = ctx.saved_tensors[:5]
            return *[None if i is None else torch.zeros_like(i) for i in inputs], *[None] * 7
        with torch.autocast(grad.device.type, enabled=False):
            # create_graph=True: the saved moments depend on x, which a second differentiation of
            # the closed form would not see. The spec is differentiable as often as wanted.
            gradients = _backward_by_spec if torch.is_grad_enabled() else _backward
            return *gradients(ctx, grad), *[None] * 7


def _backward(ctx, grad):
    (x, batch_weight, batch_bias, weight, bias, m, q, mean, inv_std, group_mean, inv_group_std,
     _) = ctx.saved_tensors  # fmt: skip
    length = x[0, 0].numel()
    rows, g = _rows(x), _rows(grad).to(m.dtype)
    dims = list(range(2, rows.dim()))
    s = inv_group_std
    gain, t = _channel_stage(m, mean, inv_std, batch_weight, batch_bias)
    t = t - group_mean  # row mean of x1, centred in its group

    centred = rows - _per_row(m, rows)
    sum_g = g.sum(dims)
    sum_gx = (g * centred).sum(dims)
    sum_gz = s * (gain * sum_gx + t * sum_g)  # z: the normalised x1, before the outer affine

    # Outer affine and group stage: dx1 = s (h - mean(h) - z mean(h z)), h = weight * grad, the
    # means over a group. Its row sums alone and against (x - m) give the rest.
    outer = _to_channels(weight, m)
    outer = torch.ones_like(m[:1]) if outer is None else outer
    mean_h = _group_mean(outer * sum_g, ctx.num_groups) / length
    mean_hz = _group_mean(outer * sum_gz, ctx.num_groups) / length
    sum_dx1 = s * (outer * sum_g - length * (mean_h + s * mean_hz * t))
    sum_dx1_x = s * (outer * sum_gx - s * mean_hz * gain * length * q)

    grad_batch_bias = sum_dx1.sum(0)
    grad_batch_weight = ((sum_dx1_x + (m - mean) * sum_dx1) * inv_std).sum(0)

    if not ctx.needs_input_grad[0]:
        grad_x = None
    else:
        p = gain * s * outer
        q_ = -((gain * s).square()) * mean_hz
        r = -gain * s * (mean_h + s * mean_hz * t)
        if ctx.differentiate_statistics:  # BatchNorm's own two terms
            count = x.numel() // x.size(1)
            slope = gain * inv_std * grad_batch_weight / count
            q_ = q_ - slope
            r = r - gain * grad_batch_bias / count - slope * (m - mean)
        # In place: `centred` becomes dx, no further full-size tensor is kept.
        grad_x = centred.mul_(_per_row(q_, rows)).add_(_per_row(r, rows))
        grad_x = grad_x.add_(g * _per_row(p, rows)).to(x.dtype).view_as(x)

    return (
        grad_x,
        None if batch_weight is None else grad_batch_weight.to(batch_weight.dtype),
        None if batch_bias is None else grad_batch_bias.to(batch_bias.dtype),
        None if weight is None else _from_channels(sum_gz.sum(0), weight),
        None if bias is None else _from_channels(sum_g.sum(0), bias),
    )


def _backward_by_spec(ctx, grad):
    x, batch_weight, batch_bias, weight, bias, *_, mean, _, _, _, var = ctx.saved_tensors
    # Aliases: x may itself depend on the parameters (a shared layer), and a gradient with respect
    # to the tensors themselves would then count the way through x a second time.
    inputs = (x, batch_weight, batch_bias, weight, bias)
    inputs = [None if i is None else i.view_as(i) for i in inputs]
    dtype = mean.dtype
    x_, *parameters = (None if i is None else i.to(dtype) for i in inputs)
    if ctx.differentiate_statistics:
        mean, var = reference.batch_statistics(x_)
    y = reference.normalize(x_, mean, var, ctx.num_groups, *parameters, ctx.eps)
    wanted = [i for i, need in zip(inputs, ctx.needs_input_grad) if need]
    found = iter(torch.autograd.grad(y, wanted, grad.to(dtype), create_graph=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad[: len(inputs)])


def _channel_stage(m, mean, inv_std, batch_weight, batch_bias):
    """Stage 1, x1 = gain (x - mean) + batch_bias: its gain (C,) and the row means of x1 (N, C)."""
    gain = inv_std if batch_weight is None else batch_weight.to(inv_std.dtype) * inv_std
    t = gain * (m - mean)
    return gain, t if batch_bias is None else t + batch_bias.to(t.dtype)


def _group_mean(values: Tensor, num_groups: int) -> Tensor:
    """(N, C): the mean over each group's channels, repeated for each of its channels."""
    n, c = values.shape
    groups = values.view(n, num_groups, c // num_groups)
    return groups.mean(2, keepdim=True).expand_as(groups).reshape(n, c)


def _to_channels(values: Tensor | None, like: Tensor) -> Tensor | None:
    """Outer affine parameter (G,) or (C,) as (1, C) in the dtype of ``like`` (N, C)."""
    if values is None:
        return None
    return reference.expand_groups(values.to(like.dtype), like.size(1)).view(1, -1)


def _from_channels(gradient: Tensor, parameter: Tensor) -> Tensor:
    """Sums a (C,) gradient to the (G,) or (C,) shape of its parameter."""
    return gradient.view(parameter.numel(), -1).sum(1).to(parameter.dtype)


def _rows(x: Tensor) -> Tensor:
    """X with at least one axis after (N, C); a view, in any memory format."""
    return x.unsqueeze(-1) if x.dim() == 2 else x


def _per_row(values: Tensor, rows: Tensor) -> Tensor:
    """(N, C) shaped to broadcast against rows (N, C, *)."""
    return values.view(*values.shape, *[1] * (rows.dim() - 2))


def _as_weight(momentum: float | Tensor, like: Tensor) -> Tensor | float:
    """Lerp wants a number or a tensor of its own dtype."""
    return momentum.to(like.dtype) if isinstance(momentum, Tensor) else momentum


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.promote_types(dtype, torch.float32)
