"""What is compared: norms, weight standardizations, and a ResNet-50 made of any two of them."""

import contextlib
import functools
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, backends, reference

NUM_GROUPS = 32


# ----------------------------------------------------------------------------------------------
# Norms


def by_reference(norm: BatchChannelNorm2d, x: Tensor) -> Tensor:
    """What ``norm(x)`` does, as the specification writes it: plain torch, nothing in place.

    Computes in the dtype of x and of the buffers, and is differentiated by autograd.
    """
    parameters = ('batch_weight', 'batch_bias', 'weight', 'bias')
    affine: dict[str, Any] = {n: getattr(norm, n).to(x.dtype) for n in parameters}
    rate: Any = norm.momentum
    y, mean, var = reference.batch_channel_norm(
        x,
        norm.num_groups,
        norm.bn.running_mean,
        norm.bn.running_var,
        **affine,
        training=norm.training,
        mode=norm.mode,
        momentum=rate,
        eps=norm.eps,
    )
    with torch.no_grad():
        norm.bn.running_mean.copy_(mean)
        norm.bn.running_var.copy_(var)
    return y.to(x.dtype)  # float32 buffers promote half precision


class PaperNorm(BatchChannelNorm2d):
    """The paper's formula as one would write it down: `by_reference`."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        return by_reference(self, x)


class EagerNorm(BatchChannelNorm2d):
    """Our layer on the backend of plain torch calls."""

    def forward(self, x: Tensor) -> Tensor:
        """As the layer."""
        with backends.use_backend('eager'):
            return super().forward(x)


NORMS = {
    'GN': 'nn.GroupNorm(32)',
    'BCN': 'ours, estimate mode',
    'BCN batch': 'ours, batch mode',
    'BN': 'nn.BatchNorm2d',
    'BN, GN': 'nn.BatchNorm2d followed by nn.GroupNorm(32)',
    'formula': "the paper's formula in plain torch, out of place, autograd",
    'BCN eager': 'ours, estimate mode, eager backend',
}
"""The peers of the norm section and what they are; ratios are to the first."""


ON_GPU = ('GN', 'BCN', 'BCN batch', 'BN')
"""Those that are timed on a GPU, where there are more dtypes and layouts and less time."""


def norms(channels: int, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """One of each of `NORMS`, in training mode, for inputs of ``dtype``.

    Parameters are float32 as in mixed precision training; those of GroupNorm have ``dtype``,
    for torch's GroupNorm does not mix them on CUDA.
    """
    group_norm = functools.partial(nn.GroupNorm, NUM_GROUPS, channels, dtype=dtype)
    made = {
        'GN': group_norm(),
        'BCN': BatchChannelNorm2d(channels, NUM_GROUPS),
        'BCN batch': BatchChannelNorm2d(channels, NUM_GROUPS, mode='batch'),
        'BN': nn.BatchNorm2d(channels),
        'BN, GN': nn.Sequential(nn.BatchNorm2d(channels), group_norm()),
        'formula': PaperNorm(channels, NUM_GROUPS),
        'BCN eager': EagerNorm(channels, NUM_GROUPS),
    }
    return {name: made[name].to(device) for name in NORMS}


# ----------------------------------------------------------------------------------------------
# Weight standardization


def one_call_standardize(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """As timm does: a weight is a batch of one sample, its output channels are the channels."""
    rows = F.batch_norm(weight.reshape(1, len(weight), -1), None, None, training=True, eps=eps)
    return rows.view_as(weight)


class OneCallWSConv2d(nn.Conv2d):
    """A convolution whose weight is standardized by `one_call_standardize`."""

    def forward(self, x: Tensor) -> Tensor:
        """As torch's convolution."""
        return self._conv_forward(x, one_call_standardize(self.weight), self.bias)


def mmcv_missing() -> str | None:
    """Why mmcv's ConvWS cannot be compared, or None."""
    return None if find_spec('mmcv') is not None else 'mmcv is not installed'


def mmcv_conv() -> type[nn.Conv2d]:
    """The class ConvWS of mmcv."""
    return importlib.import_module('mmcv.cnn.bricks.conv_ws').ConvWS2d


def mmcv_standardize() -> Callable[[Tensor], Tensor]:
    """The function of mmcv's ConvWS with its last step, the convolution, left out."""
    module: Any = importlib.import_module('mmcv.cnn.bricks.conv_ws')
    weight_only = SimpleNamespace(conv2d=lambda _, weight, *__: weight)

    def standardize(weight: Tensor) -> Tensor:
        module.F, torch_functional = weight_only, module.F
        try:
            return module.conv_ws_2d(None, weight)
        finally:
            module.F = torch_functional

    return standardize


# ----------------------------------------------------------------------------------------------
# ResNet-50


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut."""

    def __init__(
        self, conv: Callable, norm: Callable, inputs: int, width: int, stride: int
    ) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            conv(inputs, width, 1),
            norm(width),
            nn.ReLU(inplace=True),
            conv(width, width, 3, stride=stride, padding=1),
            norm(width),
            nn.ReLU(inplace=True),
            conv(width, outputs, 1),
            norm(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(conv(inputs, outputs, 1, stride=stride), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, 4 width, H / stride, W / stride)."""
        y = self.body(x)
        y += self.shortcut(x)
        return F.relu_(y)


class ResNet50(nn.Module):
    """The backbone: 53 convolutions; returns the four stages' outputs, as a detector needs them.

    Args:
        conv: Class of the convolutions, used as torch's; none has a bias.
        norm: Makes a norm from a number of channels.
        width: Channels of the stem; anything but 64 is another network, for quick runs.
    """

    def __init__(self, conv: Callable, norm: Callable, width: int = 64) -> None:
        super().__init__()
        conv = functools.partial(conv, bias=False)
        self.stem = nn.Sequential(
            conv(3, width, 7, stride=2, padding=3),
            norm(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        self.stages = nn.ModuleList()
        inputs = width
        for stage, depth in enumerate((3, 4, 6, 3)):
            blocks = []
            for block in range(depth):
                stride = 2 if block == 0 and stage > 0 else 1
                blocks.append(Bottleneck(conv, norm, inputs, width * 2**stage, stride))
                inputs = 4 * width * 2**stage
            self.stages.append(nn.Sequential(*blocks))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) to the outputs at strides 4, 8, 16 and 32."""
        x = self.stem(x)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def group_norm(channels: int) -> nn.Module:
    """nn.GroupNorm with `NUM_GROUPS` groups."""
    return nn.GroupNorm(NUM_GROUPS, channels)


def batch_channel_norm(channels: int) -> nn.Module:
    """Our BatchChannelNorm2d with `NUM_GROUPS` groups."""
    return BatchChannelNorm2d(channels, NUM_GROUPS)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """As pretrained detectors have it: running estimates and parameters stay as they are."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.requires_grad_(False)

    def train(self, mode: bool = True) -> 'FrozenBatchNorm2d':
        """Nothing."""
        super().train(False)
        return self


FROZEN = 'conv + frozen BN'
NOT_ON_GPU = ('WS + GN',)
"""Of `backbones`: left out there, for time."""


def backbones(width: int = 64) -> dict[str, Callable[[], nn.Module]]:
    """Makers of the ResNet-50s that are compared; ratios are to ``conv + GN``."""
    pairs: dict[str, tuple[Callable | None, Callable]] = {
        'conv + BN': (nn.Conv2d, nn.BatchNorm2d),
        FROZEN: (nn.Conv2d, FrozenBatchNorm2d),
        'conv + GN': (nn.Conv2d, group_norm),
        'mmcv ConvWS + GN': (None if mmcv_missing() else mmcv_conv(), group_norm),
        'one-call WS + GN': (OneCallWSConv2d, group_norm),
        'WS + GN': (WSConv2d, group_norm),
        'conv + BCN': (nn.Conv2d, batch_channel_norm),
        'WS + BCN': (WSConv2d, batch_channel_norm),
    }
    return {
        name: functools.partial(ResNet50, conv, norm, width)
        for name, (conv, norm) in pairs.items()
        if conv is not None
    }


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """Mixed precision in ``dtype``; for float32 nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)
