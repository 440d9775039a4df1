"""Several processes: the one collective, and what layers use to talk to each other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks; 1 where no process group was started."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def on_one_device(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors as they are; where a model lies on several devices, all on one of them.

    On the first that is not the CPU: the collectives of GPUs take no tensor of another device.

    Args:
        tensors: Small ones, to be computed with together.
    """
    devices = list(dict.fromkeys(tensor.device for tensor in tensors))
    if len(devices) < 2:
        return list(tensors)
    device = next(device for device in devices if device.type != 'cpu')
    return [tensor.to(device) for tensor in tensors]


def sum_over_ranks(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """The sums over all ranks, as new tensors; one all-reduce for all of them together.

    Every rank must call it with tensors of the same shapes, in the same order; the results are the
    same bits everywhere. With one rank, or without a process group: copies, no collective.

    Args:
        tensors: Any shapes, one dtype; each sum is where its tensor is.
        group: The ranks; None: all.
    """
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in on_one_device(tensors)])
    if world_size(group) > 1:
        dist.all_reduce(flat, group=group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).to(tensor.device) for part, tensor in zip(parts, tensors)]


class Ranks:
    """The ranks of a group, as `wsbcn_mm.backends.synchronised` needs them.

    Args:
        group: A process group; None: all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """See `sum_over_ranks`."""
        return sum_over_ranks(tensors, self._group)

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (ranks, *shape)."""
        parts = [torch.empty_like(tensor) for _ in range(world_size(self._group))]
        dist.all_gather(parts, tensor.contiguous(), group=self._group)
        return torch.stack(parts)


class Alone:
    """This rank as the only one: what `Ranks` does, without talking to anybody."""

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors as they are."""
        return tensors

    def gather(self, tensor: Tensor) -> Tensor:
        """(1, *shape)."""
        return tensor[None]


ALONE = Alone()
