"""Batch-Channel Normalization with the moments of all ranks: those of one large batch.

A rank sends sums over its samples before the result is computed. `ranks` is what they go through
(`wsbcn_mm.distributed.Ranks`): the math here does not know how processes talk. Every rank must take
part in every call, with an empty input too; which one a sum comes from makes no difference.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsbcn_mm import backends
from wsbcn_mm.backends import ops
from wsbcn_mm.backends.autograd import _dense, _dense_as, _like, row_moments


@torch.no_grad()
def update_estimates(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    rate: float | Tensor,
    counts: Tensor,
    ranks,
) -> None:
    """Estimate mode: updates the estimates with the samples of all ranks, in place.

    The same as `wsbcn_mm.reference.update_estimates` of all inputs in one batch, whatever their
    sizes in height and width: each sample has the same weight. One all-reduce of 2 C + 1 numbers.

    Args:
        x: (N, C, *), N >= 0.
        running_mean: (C,), the same on every rank; likewise ``running_var``.
        running_var: See ``running_mean``.
        rate: The weight of the new observation, a number or a 0-d tensor.
        counts: (2, C), see `wsbcn_mm.backends.ops`; the samples of all ranks are counted.
        ranks: Sums over the ranks.
    """
    dtype = ops.accumulation_dtype(x.dtype)
    old_mean = running_mean.to(dtype)
    offset, square = torch.zeros_like(old_mean), torch.zeros_like(old_mean)
    if x.numel():
        m, q = row_moments(x)
        m = m - old_mean
        offset, square = m.sum(0), (q + m.square()).sum(0)
    size = old_mean.new_tensor([x.size(0) if x.numel() else 0])
    offset, square, samples = ranks.sum([offset, square, size])
    # No sample anywhere: 0 / 0, which the estimates do not take in.
    mean, var = old_mean + offset / samples, square / samples
    before = counts[1].clone()
    ops.move_towards(mean, var, running_mean, running_var, rate, counts, samples.long())
    counts[1] = torch.where(samples > 0, counts[1], before)  # nothing was left out either


def batch_norm_over_ranks(
    x: Tensor,
    num_groups: int,
    running_mean: Tensor,
    running_var: Tensor,
    batch_weight: Tensor | None,
    batch_bias: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    rate: float | Tensor,
    eps: float,
    counts: Tensor,
    ranks,
) -> Tensor:
    """Batch mode with the statistics of all ranks, gradients included: SyncBN, then stage 2.

    Values, not samples, have the same weight, as in BatchNorm. One collective forward (2 C + 1
    numbers from every rank) and one all-reduce of 2 C backward. As with any BatchNorm, the
    gradients of the parameters are this rank's share, to be averaged by DistributedDataParallel.

    Args:
        x: (N, C, *), N >= 0.
        num_groups: G.
        running_mean: (C,), updated in place; likewise ``running_var``, with the unbiased variance.
        running_var: See ``running_mean``.
        batch_weight: As in `wsbcn_mm.functional.batch_channel_norm`, like the following three.
        batch_bias: See there.
        weight: See there.
        bias: See there.
        rate: The weight of the new observation.
        eps: Added to both variances.
        counts: (2, C), see `wsbcn_mm.backends.ops`.
        ranks: Talks to the other ranks.
    """
    return _BatchOverRanks.apply(
        _dense(x),
        batch_weight,
        batch_bias,
        weight,
        bias,
        running_mean,
        running_var,
        num_groups,
        rate,
        eps,
        counts,
        ranks,
    )


def _joined(values: Tensor, ranks) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values, mean and biased variance per channel over all ranks (Chan et al.)."""
    parts = ranks.gather(values)  # (ranks, 2 C + 1): values, means, variances
    count, (means, variances) = parts[:, :1], parts[:, 1:].chunk(2, 1)
    total = count.sum(0)
    mean = (count * means).sum(0) / total
    var = (count * (variances + (means - mean).square())).sum(0) / total
    return total, mean, var


class _BatchOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x,
        batch_weight,
        batch_bias,
        weight,
        bias,
        running_mean,
        running_var,
        num_groups,
        rate,
        eps,
        counts,
        ranks,
    ):
        kernels = backends.BACKENDS[backends.select(x)].kernels()
        ctx.kernels, ctx.num_groups, ctx.eps, ctx.ranks = kernels, num_groups, eps, ranks
        m = q = x.new_zeros((0, x.size(1)), dtype=ops.accumulation_dtype(x.dtype))
        own_mean = own_var = m.new_zeros(x.size(1))
        if x.numel():
            m, q = kernels.row_moments(x)
            own_mean = m.mean(0)
            own_var = (q + (m - own_mean).square()).mean(0)
        values = m.new_tensor([x.numel() // x.size(1)])
        total, mean, var = _joined(torch.cat([values, own_mean, own_var]), ranks)
        ops.move_towards(
            mean, var * (total / (total - 1)), running_mean, running_var, rate, counts, len(m)
        )
        # A single value has no variance, not even over all ranks.
        some = total > 1
        mean = torch.where(some, mean, running_mean.to(mean.dtype))
        var = torch.where(some, var, running_var.to(var.dtype))
        if not x.numel():
            ctx.save_for_backward(x, batch_weight, batch_bias, weight, bias, mean)
            return torch.empty_like(x)
        y, *group = kernels.normalize(
            x, m, q, mean, var, num_groups, batch_weight, batch_bias, weight, bias, eps
        )
        ctx.save_for_backward(
            x, batch_weight, batch_bias, weight, bias, mean, var, total, m, q, *group
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, batch_weight, batch_bias, weight, bias, mean, *saved = ctx.saved_tensors
        inputs = (x, batch_weight, batch_bias, weight, bias)
        if not x.numel():
            ctx.ranks.sum([torch.zeros_like(mean), torch.zeros_like(mean)])
            return *(None if i is None else torch.zeros_like(i) for i in inputs), *[None] * 7
        var, total, m, q, *group = saved
        affine_size = max([0] + [p.numel() for p in (weight, bias) if p is not None])
        gradients = ctx.kernels.normalize_backward(
            _dense_as(grad, x),
            x,
            m,
            q,
            mean,
            var,
            *group,
            batch_weight,
            batch_bias,
            weight,
            ctx.num_groups,
            affine_size,
            ctx.eps,
            False,
        )
        # BatchNorm's own two terms: through the mean and the variance, of all ranks.
        sum_weight, sum_bias = ctx.ranks.sum(list(gradients[1:3]))
        inv_std = (var + ctx.eps).rsqrt()
        gain = inv_std if batch_weight is None else inv_std * batch_weight.to(inv_std.dtype)
        gain = torch.where(total > 1, gain / total, 0)
        shape = (1, -1, *[1] * (x.dim() - 2))
        slope, shift = (-gain * inv_std * sum_weight).view(shape), (-gain * sum_bias).view(shape)
        centred = x.to(mean.dtype) - mean.view(shape)
        grad_x = (gradients[0] + centred.mul_(slope).add_(shift)).to(x.dtype)
        gradients = (grad_x, *gradients[1:])
        return *(None if i is None else _like(g, i) for i, g in zip(inputs, gradients)), *[None] * 7
