"""What the operators hand to the launches."""

from typing import Literal, NamedTuple

from torch import Tensor

from wsbcn_mm.backends.carriers import AffineGradients, Running


class Stage1(NamedTuple):
    """Where the statistics of stage 1 come from; see `jit.statistics.channel_statistics`."""

    source: Literal['running', 'estimate', 'batch', 'given']
    running: Running | None = None
    rate: float = 0.0
    rate_tensor: Tensor | None = None  # in place of rate

    @property
    def needs_all_samples(self) -> bool:
        return self.source in ('estimate', 'batch')


class Results(NamedTuple):
    """y and `Statistics`, of which evaluation needs few."""

    y: Tensor
    m: Tensor | None
    q: Tensor | None
    mean: Tensor
    var: Tensor
    group_mean: Tensor | None
    inv_group_std: Tensor | None


def written(gradients: AffineGradients) -> tuple[Tensor | None, ...]:
    """As the kernels take them: None for what is empty."""
    return tuple(value if value.numel() else None for value in gradients)
