"""The convolutions and norms that studies compare with, against their formulas in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from wsbcn_mm.layers import comparators

CONVS = [
    comparators.WSMeanOnlyConv2d,
    comparators.WSStdOnlyConv2d,
    comparators.WeightNormConv2d,
    comparators.CenteredWeightNormConv2d,
]
EPS = 1e-3


def expected_filter(name, w, gain):
    """One filter, from the papers' formulas."""
    centred = w - w.mean()
    if name == 'WSMeanOnlyConv2d':
        return centred
    if name == 'WSStdOnlyConv2d':
        return w / ((centred**2).mean() + EPS).sqrt()
    if name == 'WeightNormConv2d':
        return gain * w / ((w**2).sum() + EPS).sqrt()
    return gain * centred / ((centred**2).sum() + EPS).sqrt()


def expected_weight(kind, weight, gain):
    gain = [None] * len(weight) if gain is None else gain
    return torch.stack([expected_filter(kind.__name__, w, g) for w, g in zip(weight, gain)])


def make(kind, **kwargs):
    torch.manual_seed(0)
    conv = kind(4, 6, 3, padding=1, eps=EPS, **kwargs).double()
    with torch.no_grad():
        conv.weight.add_(0.3)
        if hasattr(conv, 'gain'):
            conv.gain.copy_(torch.linspace(0.5, 2, 6))
    return conv


@pytest.mark.parametrize('kwargs', [{}, dict(groups=2, bias=False, stride=2)])
@pytest.mark.parametrize('kind', CONVS)
def test_output_and_gradients(kind, kwargs):
    conv = make(kind, **kwargs)
    x = torch.randn(2, 4, 7, 5, dtype=torch.float64)
    weight = conv.weight.detach().clone().requires_grad_()
    gain = conv.gain.detach().clone().requires_grad_() if hasattr(conv, 'gain') else None
    bias = None if conv.bias is None else conv.bias.detach()
    expected = F.conv2d(
        x, expected_weight(kind, weight, gain), bias, conv.stride, 1, groups=conv.groups
    )
    actual = conv(x)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)
    actual.backward(cotangent)
    torch.testing.assert_close(conv.weight.grad, weight.grad, rtol=1e-10, atol=1e-12)
    if gain is not None:
        torch.testing.assert_close(conv.gain.grad, gain.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('kind', CONVS)
def test_plain_copy_and_state_dict(kind):
    conv = make(kind)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    plain = conv.to_plain()
    assert type(plain) is torch.nn.Conv2d
    torch.testing.assert_close(plain(x), conv(x), rtol=1e-12, atol=1e-12)
    other = kind(4, 6, 3, padding=1, eps=EPS).double()
    other.load_state_dict(conv.state_dict())
    torch.testing.assert_close(other(x), conv(x), rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(conv)(x), conv(x), rtol=0, atol=0)


@pytest.mark.parametrize('kind', [c for c in CONVS if 'Norm' in c.__name__])
def test_an_edited_gain_is_seen(kind):
    conv = make(kind, bias=False)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64)
    before = conv(x)
    with torch.no_grad():
        conv.gain.mul_(2)
    torch.testing.assert_close(conv(x), 2 * before)


def test_half_precision_is_computed_in_float32():
    conv = make(comparators.WSStdOnlyConv2d).bfloat16()
    weight = conv.standardized_weight()
    assert weight.dtype == torch.bfloat16
    exact = expected_weight(type(conv), conv.weight.detach().double(), None)
    torch.testing.assert_close(weight.double(), exact, rtol=2**-8, atol=0)


def test_sample_layer_norm():
    norm = comparators.SampleLayerNorm(4).double()
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 5))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64) * 3 + 1
    mean, var = x.mean((1, 2, 3), keepdim=True), x.var((1, 2, 3), unbiased=False, keepdim=True)
    expected = (x - mean) / (var + 1e-5).sqrt() * norm.weight.view(1, -1, 1, 1)
    torch.testing.assert_close(norm(x), expected)
