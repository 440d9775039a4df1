"""Which modules are convolutions and normalisations, of torch and of other libraries."""

import math
from typing import TypeGuard

from torch import Tensor, jit, nn
from torch.nn.modules.conv import _ConvNd

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def is_conv(module: nn.Module | None) -> TypeGuard[_ConvNd]:
    """Whether this is a convolution: of torch's classes, or one that holds what theirs do.

    Deformable convolutions (of mmcv, of torchvision) derive from nn.Module itself.
    """
    if isinstance(module, _ConvNd):
        return True
    if isinstance(module, jit.ScriptModule):  # which holds no layers of Python's
        return False
    weight = None if module is None else module._parameters.get('weight')
    kernel_size = getattr(module, 'kernel_size', None)
    widths = [getattr(module, name, None) for name in ('in_channels', 'out_channels')]
    groups = getattr(module, 'groups', 1)
    if weight is None or not isinstance(kernel_size, tuple) or not isinstance(groups, int):
        return False
    return isinstance(widths[0], int) and (
        tuple(weight.shape) == (widths[1], widths[0] // groups, *kernel_size)
    )


def is_norm(module: nn.Module) -> bool:
    """Whether this is a normalisation layer; torchvision's FrozenBatchNorm2d counts."""
    return isinstance(module, NORMS) or type(module).__name__ == 'FrozenBatchNorm2d'


def num_channels(norm: nn.Module) -> int | None:
    """The channels that a normalisation is for; None where it does not say (LayerNorm)."""
    if isinstance(norm, nn.LayerNorm):
        return None
    for name in ('num_channels', 'num_features'):
        width = getattr(norm, name, None)
        if isinstance(width, int):
            return width
    weight = getattr(norm, 'weight', None)
    return weight.numel() if isinstance(weight, Tensor) else None


# Convolutions that have a WS version of the same name.
TORCH_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
# Subclasses that convolve as torch's own class does, by name: they need not be installed. mmcv's
# wrappers accept empty inputs, which torch does by itself today. ConvWS standardizes.
SAME_AS_TORCH = {'mmcv.cnn.bricks.wrappers', 'mmcv.cnn.bricks.conv_ws.ConvWS2d'}


def torch_class(conv: nn.Module) -> type | None:
    """The class of torch that a convolution is, if it has a WS version; None for other classes."""
    kind = type(conv)
    name = f'{kind.__module__}.{kind.__qualname__}'
    if kind.__module__ in SAME_AS_TORCH or name in SAME_AS_TORCH:
        kind = next(base for base in kind.__mro__ if base in (*TORCH_CONVS, nn.Module))
    return kind if kind in TORCH_CONVS else None


def fan_in(conv: _ConvNd) -> int:
    """Weights per output channel."""
    return conv.in_channels // getattr(conv, 'groups', 1) * math.prod(conv.kernel_size)
