"""Training inside a transform of torch.func: what a transformed function may edit."""

from collections.abc import Iterable

from torch import Tensor

from wsbcn_mm import compat


def check_buffers(buffers: Iterable[Tensor], plain: bool, name: str) -> None:
    """Raises where a training step would edit buffers that a transform does not let it edit.

    Args:
        buffers: What is edited.
        plain: Nothing else is: no average, nothing of other processes.
        name: Of the layer's class.

    Raises:
        RuntimeError: the buffers are not arguments of every transform that runs; under vmap, such
            as have a value for each sample.
    """
    if plain and all(map(compat.belongs_to_transforms, buffers)):
        return
    raise RuntimeError(
        f'{name} in training updates its running statistics; a transform of torch.func (grad, '
        'vmap, jvp, ...) lets a function do that to its arguments alone\n'
        '  call eval() of the layer or of its bn; or pass the buffers, under vmap a copy for each '
        'sample: torch.func.functional_call(model, (parameters, buffers), x), in one process and '
        "with a momentum below 1, not 'cumulative'"
    )
