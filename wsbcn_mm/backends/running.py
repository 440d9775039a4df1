"""Updates of the running statistics in plain torch calls, from moments; in place."""

import torch
from torch import Tensor

from wsbcn_mm.backends import ops
from wsbcn_mm.backends.carriers import Rate, Running


def update_estimates(m: Tensor, q: Tensor, running: Running, rate: Rate) -> tuple[Tensor, Tensor]:
    """The operator `update_estimates`: estimate mode, the second moment around the old mean."""
    assert rate is not None
    square = (q + (m - running.mean.to(m.dtype)).square()).mean(0)
    return move_towards(m.mean(0), square, running, rate, len(m))


def update_from_batch(
    m: Tensor, q: Tensor, count: int, running: Running, rate: Rate
) -> tuple[Tensor, Tensor]:
    """Batch mode: the statistics of the batch from those of its rows, (C,) and (C,).

    Args:
        m: (N, C).
        q: Likewise.
        count: Values per channel, above 1.
        running: Updated as BatchNorm does, with the unbiased variance.
        rate: The weight of this batch.
    """
    assert rate is not None
    mean = m.mean(0)
    var = (q + (m - mean).square()).mean(0)
    move_towards(mean, var * (count / (count - 1)), running, rate, len(m))
    return mean, var


def move_towards(
    mean: Tensor, var: Tensor, running: Running, rate: float | Tensor, samples: int | Tensor
) -> tuple[Tensor, Tensor]:
    """Moves the running statistics by ``rate`` towards ``mean`` and ``var``.

    Args:
        mean: (C,), in the accumulation dtype.
        var: Likewise.
        running: A channel that would not be finite keeps its statistics; the update is counted.
        rate: 0 keeps them all, 1 replaces them.
        samples: What is added to the first row of ``running.counts``.

    Returns:
        What the buffers now stand for, in the dtype of ``mean``.
    """
    old_mean, old_var = running.mean.to(mean.dtype), running.var.to(mean.dtype)
    weight = rate.to(mean.dtype) if isinstance(rate, Tensor) else rate
    mean, var = old_mean.lerp(mean, weight), old_var.lerp(var, weight)
    finite = mean.to(running.mean.dtype).isfinite() & var.to(running.var.dtype).isfinite()
    mean, var = mean.where(finite, old_mean), var.where(finite, old_var)
    running.mean.copy_(mean)
    running.var.copy_(var)
    if running.counts is not None:
        running.counts.add_(torch.stack([finite * samples, ~finite]))
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
    return mean, var


ops.implement(update_estimates, 'CompositeExplicitAutograd')
