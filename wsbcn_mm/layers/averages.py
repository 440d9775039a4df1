"""Averages over inputs: the layer's own (``momentum='cumulative'``), and those that hosts take.

*Cumulative*: the rate is 1 over the number of inputs that a channel took in, this one included. An
update that was left out is none of them (`rate_of_next`, `note`).

*Hosts*: PreciseBN (fvcore, mmpretrain) sets the momentum of every BatchNorm to 1, runs the model,
averages ``running_mean`` and ``running_var`` over the inputs. The mean of the inputs' own variances
misses how far their means lie apart; the variance around the mean of the input before, which the
estimate mode's formula would give, has that twice.

So with ``momentum=1`` the mean is that of the input alone, and the variance its share in the
variance of all inputs since then, by Welford's decomposition: with M the mean of the t - 1 inputs
before, ``v = mean((x - m)^2) + (t - 1) / t (m - M)^2``. The plain average of v over the inputs is
the variance of all of them together. In code of torch.compile, and where the rate is a tensor on
another device than the CPU, it is the input's own variance alone.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wsbcn_mm.backends import running as updates
from wsbcn_mm.backends.autograd import row_moments
from wsbcn_mm.backends.carriers import Running


def rate_of_next(steps: Tensor, tracked: Tensor) -> Tensor:
    """Counts an update; its rate in a cumulative average, (C,), float64.

    Args:
        steps: (3, C), int64: how many inputs the statistics of a channel are the average of;
            ``tracked`` when that was so; and ``tracked`` when the ranks last had the same (see
            `note_of_others`). Where ``tracked`` has been changed since, by who counts anew, it is
            the number of inputs. Changed in place.
        tracked: The counter of updates of a BatchNorm, a 0-d tensor; changed in place.
    """
    inputs, known = steps[:2]
    inputs.copy_(torch.where(known == tracked, inputs, tracked))
    tracked.add_(1)
    known.copy_(tracked.expand_as(known))
    return (inputs + 1).to(torch.float64).reciprocal()


def note(steps: Tensor, taken_in: Tensor) -> None:
    """Notes which channels, (C,), have taken an input into their average."""
    steps[0].add_(taken_in)


def begin_together(steps: Tensor, tracked: Tensor) -> None:
    """Notes that all ranks have the same statistics: they were loaded, or reset."""
    steps[2].copy_(tracked.expand_as(steps[2]))


def note_of_others(steps: Tensor, tracked: Tensor, taken_in: Tensor) -> None:
    """Notes inputs that the average has taken in from other ranks.

    A rank that had no input itself counts one more update all the same: DistributedDataParallel
    gives every rank the counter of the first one.

    Args:
        steps: See `rate_of_next`; changed in place.
        tracked: Likewise.
        taken_in: (C,), the channels that have taken in an input of another rank, and none of this.
    """
    inputs, known, together = steps
    inputs.add_(taken_in)
    had_none = taken_in.any() & (together[0] == tracked)
    tracked.add_(had_none)
    known.add_(had_none)
    begin_together(steps, tracked)


def update_from_batch(input: Tensor, running: Running, rate: float | Tensor, steps: Tensor) -> None:
    """Batch mode: takes the statistics of an input into the average.

    Args:
        input: (N, C, *), with two values per channel at least.
        running: Updated in place.
        rate: Of `rate_of_next`.
        steps: Likewise.
    """
    assert running.counts is not None
    left_out = running.counts[1].clone()
    m, q = row_moments(input)
    with torch.no_grad():
        updates.update_from_batch(m, q, input.numel() // input.size(1), running, rate)
        note(steps, running.counts[1] == left_out)


class Average(NamedTuple):
    """The inputs so far, of a host that averages.

    Attributes:
        inputs: (C,), how many a channel has taken in.
        mean: (C,), of their means.
    """

    inputs: Tensor
    mean: Tensor


def add_share(running: Running, taken_in: Tensor, average: Average | None) -> Average:
    """Adds what lies between the inputs to ``running.var``, and this input to the average.

    Args:
        running: Mean and variance of an input alone; the variance is changed in place.
        taken_in: (C,), the channels in which they are: the others left the input out.
        average: Of the inputs before; None: this is the first.
    """
    mean = running.mean.double()
    if average is None:
        average = Average(torch.zeros_like(mean), mean)
    inputs = average.inputs + taken_in
    offset = (mean - average.mean).where(taken_in, 0.0) / inputs.clamp_min(1)
    running.var.add_(offset.square() * inputs * average.inputs)
    return Average(inputs, torch.where(average.inputs > 0, average.mean + offset, mean))
