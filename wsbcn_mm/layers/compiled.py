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

from wsbcn_mm import compat
from wsbcn_mm.backends import exported as exported  # what compiled code becomes
from wsbcn_mm.backends import ops, synchronised
from wsbcn_mm.backends.autograd import row_moments
from wsbcn_mm.backends.carriers import Running, flat_rate
from wsbcn_mm.backends.running import update_estimates, update_from_batch
from wsbcn_mm.distributed import ALONE
from wsbcn_mm.layers import averages, recomputation
from wsbcn_mm.layers.recomputation import Use

_library = torch.library.Library(ops.NAMESPACE, 'FRAGMENT')
# Neither rate: the average over all updates.
_library.define(
    'observe(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) counts, '
    'Tensor(d!) num_batches_tracked, Tensor(e!) steps, float? rate, Tensor? rate_tensor, '
    'bool from_batch, Tensor identity) -> (Tensor mean, Tensor var)'
)


def observe(
    x: Tensor,
    running: Running,
    steps: Tensor,
    rate: float | Tensor | None,
    from_batch: bool,
    identity: Tensor,
) -> tuple[Tensor, Tensor]:
    """Updates the running statistics, unless this is a repetition; without gradient.

    Args:
        x: (N, C, *), not empty.
        running: Updated in place; with its counters.
        steps: See `wsbcn_mm.layers.averages.rate_of_next`; changed in place.
        rate: The weight of x; None: 1 over the number of updates that were not left out.
        from_batch: Batch mode, where the statistics of x are normalised with.
        identity: See `wsbcn_mm.layers.recomputation.of`.

    Returns:
        The mean and variance to normalise with; batch mode: nothing of use.
    """
    # Detached, not under no_grad(), whose block would split what torch.export gives.
    mean, var = torch.ops.wsbcn_mm.observe(
        x.detach(), *running, steps, *flat_rate(rate), from_batch, identity
    )
    return mean, var


def _observe(x: Tensor, *flat: Any) -> tuple[Tensor, Tensor]:
    running, steps, number, tensor = Running(*flat[:4]), *flat[4:7]
    from_batch, identity = flat[7:]
    x = x.detach()  # a program of torch.export does not
    m, q = row_moments(x)
    run = recomputation.Run(identity)
    use = run.recall(m.mean(0))
    if use is None:
        assert running.num_batches_tracked is not None
        rate = _Rate(running.num_batches_tracked, steps, number, tensor)
        running = running._replace(num_batches_tracked=None)  # the rate has counted
        use = _first_use(x, m, q, running, rate, from_batch)
        # A replay of a CUDA graph would not come here: its repetitions are refused.
        if not compat.allocates_for_graphs(x.device):
            run.remember(use)
    if use.mean is None or use.var is None:
        return m.new_empty(0), m.new_empty(0)
    return use.mean.clone(), use.var.clone()


class _Rate:
    """The weight of an input, of which an update is counted.

    Args:
        tracked: The layer's counter of updates.
        steps: See `averages.rate_of_next`.
        number: A rate.
        tensor: Likewise; without any, the average.
    """

    def __init__(
        self, tracked: Tensor, steps: Tensor, number: float | None, tensor: Tensor | None
    ) -> None:
        self._steps, self.cumulative = steps, number is None and tensor is None
        self.value: float | Tensor
        if self.cumulative:
            self.value = averages.rate_of_next(steps, tracked)
            return
        tracked.add_(1)
        if tensor is None:
            assert number is not None
            self.value = number
        else:
            self.value = float(tensor) if tensor.device.type == 'cpu' else tensor

    def averages(self) -> bool | Tensor:
        """Whether the estimates are averages; on another device than the CPU a 0-d tensor."""
        return self.cumulative or self.value == 1

    def note(self, taken_in: Tensor) -> None:
        """Notes the channels whose average has taken in the input."""
        if self.cumulative:
            averages.note(self._steps, taken_in)


def _first_use(
    x: Tensor, m: Tensor, q: Tensor, running: Running, rate: _Rate, from_batch: bool
) -> Use:
    """Updates; returns what was then used."""
    if from_batch:
        assert running.counts is not None
        left_out = running.counts[1].clone()
        update_from_batch(m, q, x.numel() // x.size(1), running, rate.value)
        rate.note(running.counts[1] == left_out)
        return Use(input_mean=m.mean(0))
    average = rate.averages()
    if average is False:
        return Use(*update_estimates(m, q, running, rate.value), m.mean(0))
    rate.note(synchronised.update_estimates(x, running, rate.value, ALONE, average))
    return Use(running.mean.to(m.dtype, copy=True), running.var.to(m.dtype, copy=True), m.mean(0))


_library.impl('observe', _observe, 'CompositeExplicitAutograd')
# Without gradient, whoever calls.
_library.impl('observe', torch.library.fallthrough_kernel, 'Autograd')


@torch.library.register_fake(f'{ops.NAMESPACE}::observe', lib=_library)
def _(x: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
    channels = 0 if arguments[-2] else x.shape[1]
    dtype = ops.accumulation_dtype(x.dtype)
    return x.new_empty(channels, dtype=dtype), x.new_empty(channels, dtype=dtype)
