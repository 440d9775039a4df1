"""The layers that a folded model has in place of ours."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm.backends.layouts import CHANNELS_LAST
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.networks.own_classes import computes_with_its_weight, scaled_filters


def is_linear_in_its_weight(conv: _ConvNd) -> bool:
    """Whether scaling a convolution's weight and adding a bias does that to its output."""
    return isinstance(conv, WeightStandardized) or computes_with_its_weight(conv)


def folded_conv(conv: _ConvNd, norm: nn.Module | None) -> _ConvNd:
    """The plain convolution that does what ``conv`` does, and BCN's batch stage or BatchNorm too.

    Args:
        conv: With or without Weight Standardization.
        norm: What follows it; None: nothing that is folded.
    """
    if norm is None:
        return plain_conv(conv)
    mean, var, weight, bias, eps = _affine_of(norm)
    scale = weight.double() / (var.double() + eps).sqrt()
    shift = bias.double() - mean.double() * scale
    return _scale(plain_conv(conv, torch.float64), scale, shift, conv.weight.dtype)


def _affine_of(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    if isinstance(norm, BatchChannelNorm):
        mean, var = norm.bn.running_mean, norm.bn.running_var
        return mean, var, norm.batch_weight, norm.batch_bias, norm.eps
    assert isinstance(norm, _BatchNorm)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None and var is not None  # a norm without them is not folded
    weight = norm.weight if norm.affine else torch.ones_like(var)
    return mean, var, weight, norm.bias if norm.affine else torch.zeros_like(mean), norm.eps


def plain_conv(conv: _ConvNd, dtype: torch.dtype | None = None) -> _ConvNd:
    """The convolution without Weight Standardization.

    Its weight is the one the layer itself computes: networks without trained statistics enlarge the
    rounding of another one a thousand times.
    """
    plain = conv.to_plain() if isinstance(conv, WeightStandardized) else copy.deepcopy(conv)
    plain.requires_grad_(conv.weight.requires_grad)
    return _like(plain.to(dtype or conv.weight.dtype), conv)


def conv_with_raw_weight(conv: _ConvNd) -> _ConvNd:
    """A plain convolution that holds the parameters of a WS convolution as they are."""
    plain = plain_conv(conv)
    plain.weight.copy_(conv.weight)
    return plain


def _like(new: _ConvNd, conv: _ConvNd) -> _ConvNd:
    weight = conv.weight
    layout = CHANNELS_LAST.get(weight.dim())
    if layout is None or weight.is_contiguous():
        return new
    if not weight.is_contiguous(memory_format=layout):
        return new
    return new.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it


def _scale(
    conv: _ConvNd, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float64
) -> _ConvNd:
    """``scale * conv(x) + shift`` per output channel as one convolution, of the given dtype."""
    new = copy.deepcopy(conv)
    weight = scaled_filters(conv, conv.weight, scale)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    requires_grad = conv.weight.requires_grad
    new.weight = nn.Parameter(weight.to(dtype), requires_grad)
    new.bias = nn.Parameter(bias.to(dtype), requires_grad)
    return _like(new, conv)


def group_norm(norm: BatchChannelNorm) -> nn.GroupNorm:
    """BCN's channel stage; its scale and shift per group written out per channel."""
    like: dict[str, Any] = dict(device=norm.batch_weight.device, dtype=norm.batch_weight.dtype)
    affine = norm.weight is not None
    new = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, affine, **like)
    if affine:
        for target, source in ((new.weight, norm.weight), (new.bias, norm.bias)):
            target.copy_(source.repeat_interleave(norm.num_channels // source.numel()))
            target.requires_grad_(source.requires_grad)
    return new.eval()


def batch_norm(norm: BatchChannelNorm) -> _BatchNorm:
    """BCN's batch stage in evaluation."""
    new = norm._bn_class(norm.num_channels, norm.eps).to(norm.batch_weight)
    statistics = norm.bn.state_dict()
    new.load_state_dict(dict(statistics, weight=norm.batch_weight, bias=norm.batch_bias))
    return new.eval()


def both_stages(norm: BatchChannelNorm) -> nn.Sequential:
    """BCN in evaluation, by layers of torch."""
    return nn.Sequential(batch_norm(norm), group_norm(norm)).eval()
