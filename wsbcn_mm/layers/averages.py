"""Averages of the running statistics that hosts take themselves: ``momentum=1``, input by input.

PreciseBN (fvcore, mmpretrain) sets the momentum of every BatchNorm to 1, runs the model, averages
``running_mean`` and ``running_var`` over the inputs. The mean of the inputs' own variances misses
how far their means lie apart; the variance around the mean of the input before, which the estimate
mode's formula would give, has that twice.

So with ``momentum=1`` the mean is that of the input alone, and the variance its share in the
variance of all inputs since then, by Welford's decomposition: with M the mean of the t - 1 inputs
before, ``v = mean((x - m)^2) + (t - 1) / t (m - M)^2``. The plain average of v over the inputs is
the variance of all of them together. In code of torch.compile, and with a rate that is a tensor,
it is the input's own variance alone.
"""

from typing import NamedTuple

from torch import Tensor

from wsbcn_mm.backends.carriers import Running


class Average(NamedTuple):
    """The inputs so far.

    Attributes:
        inputs: How many.
        mean: (C,), of their means.
    """

    inputs: int
    mean: Tensor


def add_share(running: Running, average: Average | None) -> Average:
    """Adds what lies between the inputs to ``running.var``, and this input to the average.

    Args:
        running: Mean and variance of an input alone; the variance is changed in place.
        average: Of the inputs before; None: this is the first.
    """
    if average is None:
        return Average(1, running.mean.clone())
    inputs, before = average.inputs + 1, average.mean.to(running.mean)
    offset = running.mean - before
    running.var.add_(offset.square() * ((inputs - 1) / inputs))
    return Average(inputs, before + offset / inputs)
