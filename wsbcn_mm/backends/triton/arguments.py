"""Checks of what is read and written through pointers: sizes, dtypes and devices.

The layers have checked their arguments when they were made; a parameter or a buffer may have been
replaced since, as pruning tools do.
"""

import torch
from torch import Tensor

from wsbcn_mm.backends.carriers import Affine, Rate, Running, Statistics
from wsbcn_mm.backends.layouts import dense
from wsbcn_mm.backends.ops import DTYPES, accumulation_dtype

Size = tuple[int, ...] | torch.Size


def check_tensor(name: str, tensor: Tensor, sizes: tuple[Size, ...], device: torch.device) -> None:
    """One of these sizes, a floating dtype that the kernels know, this device.

    Raises:
        ValueError: another size or device.
        TypeError: another dtype.
    """
    if tensor.shape not in sizes:
        expected = ' or '.join(str(tuple(size)) for size in sizes)
        raise ValueError(
            f'{name} must have shape {expected}, as the input asks for\n'
            f'  got {tuple(tensor.shape)}: was a parameter or buffer replaced by another one?'
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(
            f'{name} must be one of {", ".join(map(str, DTYPES))}\n  got {tensor.dtype}'
        )
    if tensor.device != device:
        raise ValueError(
            f'{name} must be on the device of the input, {device}\n'
            f'  got {tensor.device}: move the module, or the input'
        )


def checked_input(x: Tensor, num_groups: int) -> Tensor:
    """X as the kernels read it: itself, or a dense copy.

    (N, C, *), not empty, with channels that the groups divide.
    """
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(
            f'x must have shape (N, C, *) and not be empty\n  got shape {tuple(x.shape)}'
        )
    check_tensor('x', x, (x.shape,), x.device)
    if num_groups < 1 or x.size(1) % num_groups:
        raise ValueError(
            f'num_groups must divide the channels of x, {x.size(1)}\n  got {num_groups}'
        )
    return dense(x)


def check_running(running: Running, x: Tensor) -> None:
    """The buffers fit x."""
    channels = ((x.size(1),),)
    check_tensor('running_mean', running.mean, channels, x.device)
    check_tensor('running_var', running.var, channels, x.device)
    tracked, counts = running.num_batches_tracked, running.counts
    if tracked is not None:
        fits = tracked.dtype is torch.int64 and tracked.numel() == 1
        if not fits or tracked.device != x.device:
            raise ValueError(
                f'num_batches_tracked must be one torch.int64 on {x.device}\n'
                f'  got {tracked.dtype} of shape {tuple(tracked.shape)} on {tracked.device}'
            )
    if counts is None:
        return
    if counts.dtype != torch.int64:
        raise TypeError(f'counts must be torch.int64\n  got {counts.dtype}')
    fits = counts.shape == (2, x.size(1)) and counts.is_contiguous()
    if not fits or counts.device != x.device:
        raise ValueError(
            f'counts must have shape (2, {x.size(1)}), be contiguous and on {x.device}\n'
            f'  got {tuple(counts.shape)} with strides {counts.stride()} on {counts.device}'
        )


def check_affine(affine: Affine, num_groups: int, x: Tensor) -> None:
    """The parameters fit x."""
    channels, groups = (x.size(1),), (num_groups,)
    for name, value in zip(affine._fields, affine):
        if value is not None:
            sizes = (channels,) if name.startswith('batch') else (groups, channels)
            check_tensor(name, value, sizes, x.device)


def check_statistics(statistics: Statistics, num_groups: int, x: Tensor) -> None:
    """What the forward pass found fits x."""
    rows, channels, groups = x.shape[:2], x.shape[1:2], (x.size(0), num_groups)
    expected = (rows, rows, channels, channels, groups, groups)
    dtype = accumulation_dtype(x.dtype)
    for name, value, size in zip(statistics._fields, statistics, expected):
        check_tensor(name, value, (size,), x.device)
        if value.dtype != dtype:
            raise TypeError(f'{name} must be {dtype}\n  got {value.dtype}')


def number_or_pointer(rate: Rate, x: Tensor) -> tuple[float, Tensor | None]:
    """A rate as the kernels take it: a number, or a tensor that they read.

    Raises:
        ValueError: not a number or a 0-d tensor on the device of x or the CPU.
    """
    if not isinstance(rate, Tensor):
        return (0.0 if rate is None else rate), None
    if rate.device != x.device:
        if rate.device.type != 'cpu':
            raise ValueError(f'rate must be on {x.device} or the CPU\n  got {rate.device}')
        return float(rate.item()), None  # on the host, where reading it waits for nothing
    check_tensor('rate', rate, ((),), x.device)
    return 0.0, rate
