"""What travels together between a layer and a kernel, and back through autograd.

A function takes carriers; an operator of torch cannot, so its schema lists their fields, in the
same place and order (`FLAT`). tests/backends/test_contract.py keeps the two equal.
"""

from typing import NamedTuple

from torch import Tensor

Rate = float | Tensor | None
"""The weight of the new observation in the running statistics: a number in [0, 1], a 0-d tensor of
any dtype on the device of x or the CPU, or None: the running statistics are used as they are."""


class Running(NamedTuple):
    """The buffers of a layer, updated in place.

    Attributes:
        mean: (C,), any floating dtype.
        var: Likewise.
        counts: (2, C), contiguous int64: the samples that entered a channel's statistics, and the
            updates that it left out. None: nobody asks.
        num_batches_tracked: One int64, to which an update adds 1. None: nobody asks.
    """

    mean: Tensor
    var: Tensor
    counts: Tensor | None = None
    num_batches_tracked: Tensor | None = None


class Affine(NamedTuple):
    """Scales and shifts of both stages, in any floating dtype.

    Attributes:
        batch_weight: (C,), stage 1. None: 1.
        batch_bias: (C,), stage 1. None: 0.
        weight: (G,) or (C,), stage 2. None: 1.
        bias: (G,) or (C,), stage 2. None: 0.
    """

    batch_weight: Tensor | None
    batch_bias: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


class Statistics(NamedTuple):
    """What the forward pass found, which the backward pass needs; in the accumulation dtype.

    Attributes:
        m: (N, C), mean of each row; a row is one (sample, channel) of x.
        q: (N, C), its biased variance.
        mean: (C,), the mean that stage 1 used.
        var: (C,), its variance.
        group_mean: (N, G), mean of each group after stage 1.
        inv_group_std: (N, G), one over its standard deviation.
    """

    m: Tensor
    q: Tensor
    mean: Tensor
    var: Tensor
    group_mean: Tensor
    inv_group_std: Tensor


class AffineGradients(NamedTuple):
    """Gradients of `Affine`, in the accumulation dtype, as the kernels give them.

    Attributes:
        batch_weight: (C,).
        batch_bias: (C,).
        weight: As many values as the larger of weight and bias has; empty where neither is there.
        bias: Likewise.
    """

    batch_weight: Tensor
    batch_bias: Tensor
    weight: Tensor
    bias: Tensor


FLAT: dict[object, tuple[str, ...]] = {
    Running: ('running_mean', 'running_var', 'counts', 'num_batches_tracked'),
    Affine: Affine._fields,
    Statistics: Statistics._fields,
    Rate: ('rate', 'rate_tensor'),
}
"""The names of a carrier's fields in the schema of an operator."""


def flat_rate(rate: Rate) -> tuple[float | None, Tensor | None]:
    """A rate as the schemas take it: the number or the tensor, the other one None."""
    return (None, rate) if isinstance(rate, Tensor) else (rate, None)


def outer_size(affine: Affine) -> int:
    """The size of the gradients of weight and bias: G, C, or 0 where neither is there."""
    return max([0] + [p.numel() for p in (affine.weight, affine.bias) if p is not None])
