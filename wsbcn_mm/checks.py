"""Every check of an argument, with the names that arguments may have.

A check says which argument it is, what was expected, what came, and what to do.
"""

import math
import numbers
from typing import Any

from torch import Tensor

FORMULAS = ('paper', 'std_eps', 'var_eps')
MODES = ('estimate', 'batch')


def check_choice(value: str | None, choices: tuple[str | None, ...], name: str) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {", ".join(map(repr, choices))}\n  got {value!r}')


def check_eps(eps: float) -> None:
    """Raises ValueError unless ``eps`` is a finite number >= 0."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f'eps must be a number >= 0\n  got {eps!r} of type {type(eps).__name__}')
    if not 0 <= eps < math.inf:
        raise ValueError(f'eps must be finite and >= 0 (usual: 1e-5)\n  got {eps!r}')


def checked_rate(momentum: float | Tensor) -> float | Tensor:
    """A rate as the layers keep it: any real number in [0, 1] as a float, or a 0-d tensor as it is.

    A tensor is not looked into, which would wait for its device.

    Raises:
        TypeError: neither a real number (NumPy's count) nor a 0-d tensor of floating point.
        ValueError: not in [0, 1].
    """
    if isinstance(momentum, Tensor) and momentum.dim() == 0 and momentum.is_floating_point():
        return momentum
    if isinstance(momentum, bool) or not isinstance(momentum, numbers.Real):
        raise TypeError(
            'momentum must be a number in [0, 1], the weight of the new observation, or a 0-d '
            f'tensor of floating point\n  got {momentum!r} of type {type(momentum).__name__}'
        )
    rate = float(momentum)
    if not 0 <= rate <= 1:
        raise ValueError(
            'momentum must lie in [0, 1]; it is the weight of the new observation, as in '
            f'torch.nn.BatchNorm2d\n  got {momentum!r}'
        )
    return rate


def check_groups(num_channels: int, num_groups: Any) -> None:
    """Raises ValueError unless ``num_groups`` is a positive divisor of ``num_channels``."""
    for name, value in (('num_channels', num_channels), ('num_groups', num_groups)):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            kind = type(value).__name__
            raise TypeError(f'{name} must be an int\n  got {value!r} of type {kind}')
        if value < 1:
            raise ValueError(f'{name} must be at least 1\n  got {value}')
    if num_channels % num_groups:
        divisors = [g for g in range(1, num_channels + 1) if num_channels % g == 0]
        nearest = min(divisors, key=lambda g: abs(g - num_groups))
        raise ValueError(
            'num_channels must be divisible by num_groups\n'
            f'  got num_channels={num_channels}, num_groups={num_groups}\n'
            f'  for {num_channels} channels num_groups={nearest} would fit'
        )


def auto_groups(num_channels: int) -> int:
    """The number of groups for a width: the largest divisor, at most 32, that leaves two channels.

    A group of a single channel would be an instance normalisation. 64 and more channels of the
    usual widths get the paper's 32; 48 get 24, 32 get 16, a prime number 1.

    Args:
        num_channels: C.
    """
    fitting = (g for g in range(min(32, num_channels // 2), 1, -1) if num_channels % g == 0)
    return next(fitting, 1)


def check_fan_in(fan_in: int) -> None:
    """Raises ValueError where there is nothing to standardize over."""
    if fan_in < 2:
        raise ValueError(
            'weight standardization needs at least 2 weights per output channel '
            '(in_channels / groups * kernel area)\n'
            f'  got {fan_in}: its standardized value would be 0 whatever the weight is\n'
            '  use a plain convolution here (depthwise 1x1 convolutions cannot be standardized)'
        )


def check_floating(value: Tensor, name: str) -> None:
    """Raises TypeError unless ``value`` is a tensor of floating-point numbers."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        actual = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f'{name} must be a floating-point tensor\n  got {actual}')
