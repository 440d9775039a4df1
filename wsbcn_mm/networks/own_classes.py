"""Layers of classes of their own: whether they compute what torch's do, found out on a copy.

A library derives its layers from torch's and changes what they do (pads in another way, masks,
mixes several weights) or does not (adds an activation). Only in the second case may another layer
take their place.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm.networks.copies import copied

_PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep


def is_ours(function: Callable[..., Any]) -> bool:
    """Whether a function is written in this package, whatever it says of itself."""
    code = getattr(function, '__code__', None)
    return code is not None and code.co_filename.startswith(_PACKAGE)


def has_own_forward(layer: nn.Module) -> bool:
    """Whether a layer of this package runs somebody else's code: of a subclass, or set on it."""
    return 'forward' in layer.__dict__ or not is_ours(type(layer).forward)


def _is_torchs(layer: nn.Module) -> bool:
    """Whether a layer is one of torch's, and does what its class says."""
    set_on_it = {'forward', '_conv_forward'} & layer.__dict__.keys()
    return not set_on_it and type(layer).__module__.startswith('torch.nn.modules.')


def is_transposed(conv: _ConvNd) -> bool:
    """Whether the weight is (C_in, C_out / groups, *k)."""
    return bool(getattr(conv, 'transposed', False))


def scaled_filters(conv: _ConvNd, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight of a convolution with each filter times a number.

    Args:
        conv: The convolution.
        weight: In the shape of its own.
        scale: (C_out,).
    """
    ones = [1] * (weight.dim() - 2)
    if not is_transposed(conv):
        return weight * scale.view(-1, 1, *ones)
    by_group = weight.unflatten(0, (conv.groups, -1))  # (G, C_in / G, C_out / G, *k)
    return (by_group * scale.view(conv.groups, 1, -1, *ones)).flatten(0, 1)


@torch.no_grad()
def computes_with_its_weight(conv: _ConvNd) -> bool:
    """Whether a layer of a convolution class convolves with ``weight`` as it is, and adds ``bias``.

    Then scaling filters and adding a bias does that to its output; a layer that computes its weight
    (by standardizing, by mixing several) does something else. Found out by trying, on a copy.
    """
    if hasattr(conv, 'parametrizations') or 'weight' not in conv._parameters:
        return False
    if _is_torchs(conv):
        return True
    trial = copied(conv, hooks=False)
    trial = trial.to_empty(device='cpu') if conv.weight.is_meta else trial.cpu()
    trial.double()
    generator = torch.Generator().manual_seed(0)
    try:
        x, *offsets = _trial_inputs(conv, generator)
    except (AttributeError, TypeError):  # it lacks what torch's have
        return False
    size = x.shape[2:]
    weight = torch.randn(conv.weight.shape, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.5, 2, conv.out_channels, dtype=torch.float64)
    shift = scale if 'bias' in conv._parameters else torch.zeros_like(scale)
    outputs = []
    changes = (weight, torch.zeros_like(scale)), (scaled_filters(conv, weight, scale), shift)
    for values, bias in changes:
        trial.weight = nn.Parameter(values.clone())
        if 'bias' in conv._parameters:
            trial.bias = nn.Parameter(bias)
        try:
            outputs.append(trial(x, *offsets))
        except Exception:  # noqa: BLE001  it wants other arguments: not a convolution as torch's
            return False
        if not torch.equal(trial.weight, values):  # it edits what it takes for its weight (masks)
            return False
    plain, changed = outputs
    if not isinstance(plain, Tensor) or plain.dim() != x.dim() or plain.shape[1] != len(scale):
        return False
    factor, summand = (t.view(-1, *[1] * len(size)) for t in (scale, shift))
    return torch.allclose(changed, plain * factor + summand, 1e-9, 1e-9)


def _trial_inputs(conv: _ConvNd, generator: torch.Generator) -> list[Tensor]:
    """A small random input, and the offsets and the mask that a deformable convolution is given."""
    size = [
        d * (k - 1) + 1 + 2 * s for k, d, s in zip(conv.kernel_size, conv.dilation, conv.stride)
    ]
    shapes = [(conv.in_channels, *size)]
    names = list(inspect.signature(conv.forward).parameters)[1:3]
    for name, values in (('offset', 2), ('mask', 1)):
        if name in names:
            paddings: Any = conv.padding
            output = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip(
                    size, paddings, conv.dilation, conv.kernel_size, conv.stride
                )
            ]
            parts = getattr(conv, 'deform_groups', 1)
            shapes.append((values * parts * math.prod(conv.kernel_size), *output))
    return [torch.randn(2, *s, generator=generator, dtype=torch.float64) for s in shapes]


ACTIVATION = ('drop', 'act')  # children of timm's norms with an activation, which runs behind them


@torch.no_grad()
def normalises_as_its_kind(norm: Any, activation: bool = True) -> bool:
    """Whether a BatchNorm or GroupNorm computes in evaluation what torch's does.

    MMPretrain's sparse BatchNorms, for one, see and write some places of a map alone.

    Args:
        norm: The layer.
        activation: It may have an activation of its own behind it, as those of timm do.
    """
    if _is_torchs(norm):
        return True
    trial = copied(norm, hooks=False)
    trial = trial.to_empty(device='cpu') if _on_meta(norm) else trial.cpu()
    trial.double().eval()
    for name in ACTIVATION if activation else ():
        if name in trial._modules:
            trial._modules[name] = nn.Identity()
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor | None] = {}
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        tensors[name] = tensor = getattr(trial, name, None)
        if tensor is not None:
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5)
    grouped = isinstance(norm, nn.GroupNorm)
    axes = {nn.BatchNorm1d: 1, nn.BatchNorm3d: 3}
    dim = next((number for kind, number in axes.items() if isinstance(norm, kind)), 2)
    width = norm.num_channels if grouped else norm.num_features
    x = torch.randn(2, width, *[4] * dim, generator=generator, dtype=torch.float64)
    try:
        y = trial(x)
    except Exception:  # noqa: BLE001  it wants something else than torch's
        return False
    weight, bias = tensors['weight'], tensors['bias']
    if grouped:
        expected = F.group_norm(x, norm.num_groups, weight, bias, norm.eps)
    else:
        mean, var = tensors['running_mean'], tensors['running_var']
        expected = F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, norm.eps)
    return isinstance(y, Tensor) and y.shape == x.shape and torch.allclose(y, expected, 1e-9, 1e-9)


def _on_meta(module: nn.Module) -> bool:
    return any(t.is_meta for t in (*module.parameters(), *module.buffers()))
