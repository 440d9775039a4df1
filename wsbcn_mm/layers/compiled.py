"""What compiled code does to the running statistics: an operator that decides when it runs.

torch.compile traces a layer once and may compute parts of its forward pass again in the backward
pass; checkpointing may run compiled code twice. What is an update and what its repetition is known
only then (`wsbcn_mm.layers.recomputation`), and to nobody who looks at the traced code. So the
update is one operator that the compiler cannot look into: a first run updates and remembers, a
repetition returns what was used and changes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from wsbcn_mm.backends import ops, synchronised
from wsbcn_mm.backends.autograd import row_moments
from wsbcn_mm.backends.carriers import Running, flat_rate
from wsbcn_mm.backends.running import update_estimates, update_from_batch
from wsbcn_mm.distributed import ALONE
from wsbcn_mm.layers import recomputation
from wsbcn_mm.layers.recomputation import Use

_library = torch.library.Library(ops.NAMESPACE, 'FRAGMENT')
# Neither rate: the average over all updates.
_library.define(
    'observe(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) counts, '
    'Tensor(d!) num_batches_tracked, float? rate, Tensor? rate_tensor, bool from_batch, '
    'Tensor identity) -> (Tensor mean, Tensor var)'
)


def observe(
    x: Tensor,
    running: Running,
    num_batches_tracked: Tensor,
    rate: float | Tensor | None,
    from_batch: bool,
    identity: Tensor,
) -> tuple[Tensor, Tensor]:
    """Updates the running statistics, unless this is a repetition; without gradient.

    Args:
        x: (N, C, *), not empty.
        running: Updated in place.
        num_batches_tracked: Counts the updates, in place.
        rate: The weight of x; None: 1 over the number of updates.
        from_batch: Batch mode, where the statistics of x are normalised with.
        identity: See `wsbcn_mm.layers.recomputation.of`.

    Returns:
        The mean and variance to normalise with; batch mode: nothing of use.
    """
    with torch.no_grad():
        mean, var = torch.ops.wsbcn_mm.observe(
            x.detach(), *running, num_batches_tracked, *flat_rate(rate), from_batch, identity
        )
    return mean, var


def _observe(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    running, (tracked, rate, rate_tensor, from_batch, identity) = Running(*flat[:3]), flat[3:]
    m, q = row_moments(x)
    run = recomputation.Run(identity)
    use = run.recall(m.mean(0))
    if use is None:
        tracked.add_(1)
        weight = rate if rate_tensor is None else rate_tensor
        average = weight is None or (isinstance(weight, float) and weight == 1)
        if weight is None:
            weight = tracked.to(torch.float64).reciprocal()
        if average and not from_batch:
            use = _average(x, m, running, weight)
        else:
            use = _update(x, m, q, running, weight, from_batch)
        # A replay of a CUDA graph would not come here: its repetitions are refused.
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            run.remember(use)
    if use.mean is None or use.var is None:
        return m.new_empty(0), m.new_empty(0)
    return use.mean.clone(), use.var.clone()


def _average(x: Tensor, m: Tensor, running: Running, rate: float | Tensor) -> Use:
    synchronised.update_estimates(x, running, rate, ALONE, average=True)
    return Use(running.mean.to(m.dtype, copy=True), running.var.to(m.dtype, copy=True), m.mean(0))


def _update(
    x: Tensor, m: Tensor, q: Tensor, running: Running, rate: float | Tensor, from_batch: bool
) -> Use:
    if from_batch:
        update_from_batch(m, q, x.numel() // x.size(1), running, rate)
        return Use(input_mean=m.mean(0))
    return Use(*update_estimates(m, q, running, rate), m.mean(0))


_library.impl('observe', _observe, 'CompositeExplicitAutograd')


@torch.library.register_fake(f'{ops.NAMESPACE}::observe', lib=_library)
def _(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    channels = 0 if arguments[-2] else x.shape[1]
    dtype = ops.accumulation_dtype(x.dtype)
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
