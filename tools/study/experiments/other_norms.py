"""What somebody with one image per step could take instead: norms that bring their activation.

They are for comparison in the study alone. Where a `ConvModule` has an activation it is theirs;
before an addition they only normalize, and the block's own ReLU follows.
"""

from __future__ import annotations

import torch
from mmcv.cnn import ConvModule
from mmengine.registry import MODELS
from torch import Tensor, nn


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


@MODELS.register_module()
class FRN(nn.Module):
    """Filter Response Normalization and Thresholded Linear Unit (Singh and Krishnan, 1911.09737).

    y = max(weight x / sqrt(mean(x^2) + eps) + bias, threshold), the mean over a channel's (H, W).

    Args:
        channels: C of (N, C, H, W).
        eps: Added to the mean square.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps, self.activates = eps, False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.threshold = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of ``x``."""
        scale = (x.square().mean((2, 3), keepdim=True) + self.eps).rsqrt()
        y = x * scale * _per_channel(self.weight) + _per_channel(self.bias)
        return torch.maximum(y, _per_channel(self.threshold)) if self.activates else y


@MODELS.register_module()
class EvoNormS0(nn.Module):
    """EvoNorm-S0 (Liu et al., 2004.02967).

    y = weight x sigmoid(v x) / sqrt(var + eps) + bias, variance over (channels, H, W) of a group.
    Without activation (ours): y = weight x / sqrt(var + eps) + bias.

    Args:
        channels: C of (N, C, H, W).
        num_groups: Groups of channels.
        eps: Added to the variance.
    """

    def __init__(self, channels: int, num_groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_groups, self.eps, self.activates = num_groups, eps, False
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape of ``x``."""
        groups = x.reshape(len(x), self.num_groups, -1)
        scale = (groups.var(2, unbiased=False, keepdim=True) + self.eps).rsqrt()
        y = (groups * scale).view_as(x)
        if self.activates:
            y = y * torch.sigmoid(_per_channel(self.v) * x)
        return y * _per_channel(self.weight) + _per_channel(self.bias)


def give_activations(model: nn.Module) -> nn.Module:
    """Norms that bring an activation replace that of their `ConvModule`; returns the model."""
    for layer in model.modules():
        if isinstance(layer, ConvModule) and hasattr(layer.norm, 'activates'):
            layer.norm.activates, layer.with_activation = layer.with_activation, False
    return model
