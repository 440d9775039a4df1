"""What the tests of standardization share: small models, and what they must compute."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import wsbcn_mm
from wsbcn_mm import WSConv2d, reference

FLOAT = dict(dtype=torch.float64)
X = torch.linspace(-2, 3, 2 * 4 * 5 * 5, **FLOAT).view(2, 4, 5, 5)


def conv(kind=WSConv2d, **settings):
    return kind(4, 4, 3, padding=1, **FLOAT | settings)


def net(layers=3, attached=True, **settings):
    model = nn.Sequential(*(conv(**settings) for _ in range(layers)))
    if attached:
        wsbcn_mm.standardize_once_per_forward(model)
    return model


def rand(*shape):
    return torch.randn(*shape, **FLOAT)


def expected(model, x=X):
    """What the model computes with its weights as they are, by the specification."""
    for layer in model:
        weight = reference.weight_standardize(layer.weight, layer.eps, layer.formula)
        x = F.conv2d(x, weight, layer.bias, padding=1)
    return x


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def gradients(model, y):
    model.zero_grad()
    y.square().sum().backward()
    return [p.grad for p in model.parameters()]


def reference_of(model):
    """Parameters of a copy, with the gradients that autograd finds through the specification."""
    twin = copy.deepcopy(model)
    gradients(twin, expected(twin))
    return list(twin.parameters())


def shrunk(model):
    """Structured pruning: fewer output channels (of the last layer, so that the model runs)."""
    model[-1].weight.data = model[-1].weight.data[:2]
    model[-1].bias.data = model[-1].bias.data[:2]
