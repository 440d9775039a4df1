"""Batch-Channel Normalization with the moments of all ranks: those of one large batch.

A rank sends sums over its samples before the result is computed. `ranks` is what they go through
(`wsbcn_mm.distributed.Ranks`): the math here does not know how processes talk. Every rank must take
part in every call, with an empty input too; which one a sum comes from makes no difference.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from wsbcn_mm import backends
from wsbcn_mm.backends import ops
from wsbcn_mm.backends.autograd import gradients_of, row_moments
from wsbcn_mm.backends.carriers import Affine, Running, Statistics
from wsbcn_mm.backends.layouts import dense
from wsbcn_mm.backends.running import move_towards


class Ranks(Protocol):
    """What a rank talks to the others through."""

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The sums of all ranks."""

    def gather(self, values: Tensor) -> Tensor:
        """(ranks, len(values)): the values of all ranks."""


@torch.no_grad()
def update_estimates(
    x: Tensor,
    running: Running,
    rate: float | Tensor,
    ranks: Ranks,
    average: bool | Tensor = False,
) -> Tensor:
    """Estimate mode: updates the estimates with the samples of all ranks, in place.

    The same as `wsbcn_mm.reference.update_estimates` of all inputs in one batch, whatever their
    sizes in height and width: each sample has the same weight. One all-reduce of 2 C + 1 numbers.

    Args:
        x: (N, C, *), N >= 0.
        running: The same on every rank, counts included: the samples of all ranks are counted.
        rate: The weight of the new observation: a number, a 0-d tensor, or one for each channel.
        ranks: Sums over the ranks.
        average: See `wsbcn_mm.reference.update_estimates`; or a 0-d tensor that says so.

    Returns:
        (C,), the channels that took an input in.
    """
    assert running.counts is not None
    # The average takes a difference of squares.
    dtype = ops.accumulation_dtype(x.dtype) if average is False else torch.float64
    old_mean = running.mean.to(dtype)
    offset, square = torch.zeros_like(old_mean), torch.zeros_like(old_mean)
    if x.numel():
        m, q = row_moments(x)
        m, q = m.to(dtype) - old_mean, q.to(dtype)
        offset, square = m.sum(0), (q + m.square()).sum(0)
    # Not new_tensor: a copy of a list waits for the device.
    size = old_mean.new_full((1,), x.size(0) if x.numel() else 0)
    offset, square, samples = ranks.sum([offset, square, size])
    # No sample anywhere: 0 / 0, which the estimates do not take in.
    offset, var = offset / samples, square / samples
    if average is not False:
        around_true_mean = (var - rate * offset.square()).clamp_min(0)
        var = around_true_mean if average is True else around_true_mean.where(average, var)
    mean = old_mean + offset
    before = running.counts.clone()
    move_towards(mean, var, running, rate, samples.long())
    # Then nothing was left out either.
    running.counts[1] = torch.where(samples > 0, running.counts[1], before[1])
    return running.counts[0] > before[0]


def batch_norm_over_ranks(
    x: Tensor,
    num_groups: int,
    running: Running,
    affine: Affine,
    rate: float | Tensor,
    eps: float,
    ranks: Ranks,
) -> Tensor:
    """Batch mode with the statistics of all ranks, gradients included: SyncBN, then stage 2.

    Values, not samples, have the same weight, as in BatchNorm. One collective forward (2 C + 1
    numbers from every rank) and one all-reduce of 2 C backward. As with any BatchNorm, the
    gradients of the parameters are this rank's share, to be averaged by DistributedDataParallel.

    Args:
        x: (N, C, *), N >= 0.
        num_groups: G.
        running: Updated in place, with the unbiased variance.
        affine: As in `wsbcn_mm.functional.batch_channel_norm`.
        rate: The weight of the new observation.
        eps: Added to both variances.
        ranks: Talks to the other ranks.
    """
    call = _Call(num_groups, running, rate, eps, ranks)
    y: Tensor = _BatchOverRanks.apply(  # type: ignore[no-untyped-call]
        dense(x), *affine, call
    )
    return y


class _Call(NamedTuple):
    """What a call computes with, beside the tensors that it is differentiated by."""

    num_groups: int
    running: Running
    rate: float | Tensor
    eps: float
    ranks: Ranks


def _joined(values: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
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
        ctx: Any,
        x: Tensor,
        batch_weight: Tensor | None,
        batch_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        call: _Call,
    ) -> Tensor:
        num_groups, running, rate, eps, ranks = call
        affine = Affine(batch_weight, batch_bias, weight, bias)
        kernels = backends.kernels(backends.select(x))
        ctx.kernels, ctx.num_groups, ctx.eps, ctx.ranks = kernels, num_groups, eps, ranks
        m = q = x.new_zeros((0, x.size(1)), dtype=ops.accumulation_dtype(x.dtype))
        own_mean = own_var = m.new_zeros(x.size(1))
        if x.numel():
            m, q = kernels.row_moments(x)
            own_mean = m.mean(0)
            own_var = (q + (m - own_mean).square()).mean(0)
        values = m.new_full((1,), x.numel() // x.size(1))  # see `update_estimates`
        total, mean, var = _joined(torch.cat([values, own_mean, own_var]), ranks)
        move_towards(mean, var * (total / (total - 1)), running, rate, len(m))
        # A single value has no variance, not even over all ranks.
        has_variance = total > 1
        mean = torch.where(has_variance, mean, running.mean.to(mean.dtype))
        var = torch.where(has_variance, var, running.var.to(var.dtype))
        if not x.numel():
            ctx.save_for_backward(x, *affine, mean)
            return torch.empty_like(x)
        y, *group = kernels.normalize(x, num_groups, m, q, mean, var, affine, eps)
        ctx.save_for_backward(x, *affine, total, m, q, mean, var, *group)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        affine = Affine(*saved[:4])
        if not x.numel():
            mean = saved[4]
            ctx.ranks.sum([torch.zeros_like(mean), torch.zeros_like(mean)])
            return *(None if i is None else torch.zeros_like(i) for i in (x, *affine)), None
        total, statistics = saved[4], Statistics(*saved[5:])
        mean, var = statistics.mean, statistics.var
        grad_x, of_affine = ctx.kernels.normalize_backward(
            grad, x, ctx.num_groups, statistics, affine, ctx.eps, False
        )
        # BatchNorm's own two terms: through the mean and the variance, of all ranks.
        sum_weight, sum_bias = ctx.ranks.sum([of_affine.batch_weight, of_affine.batch_bias])
        gain = inv_std = (var + ctx.eps).rsqrt()
        if affine.batch_weight is not None:
            gain = inv_std * affine.batch_weight.to(inv_std.dtype)
        gain = torch.where(total > 1, gain / total, 0)
        shape = (1, -1, *[1] * (x.dim() - 2))
        slope, shift = (-gain * inv_std * sum_weight).view(shape), (-gain * sum_bias).view(shape)
        centred = x.to(mean.dtype) - mean.view(shape)
        grad_x = (grad_x + centred.mul_(slope).add_(shift)).to(x.dtype)
        return grad_x, *gradients_of(affine, of_affine), None
