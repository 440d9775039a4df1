"""Diagnostics against direct computation on small networks whose answers are known."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, WSConvTranspose2d
from wsbcn_mm.diagnostics import (
    ActivationObserver,
    EstimateObserver,
    WeightGradientObserver,
    estimate_gaps,
    singularities,
    smoothness,
)


class Relus(nn.Module):
    """Every way of calling a ReLU, one module twice, and a sigmoid."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        a = self.relu(x.clone())
        b = self.relu(x * 2)
        return a + b + torch.relu(x) + x.relu() + F.relu(x.sigmoid() - 0.5)


def test_statistics_of_a_relu():
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    x[:, 1] = -x[:, 1].abs() - 1000  # off for every sample, far from zero
    x[0, 2] = -1
    x[:, 3] = x[:, 3].abs() + 1
    model = nn.Sequential(nn.ReLU())
    with ActivationObserver(model) as seen:
        model(x[:1])
        model(x[1:])
    ((name, layer),) = seen.layers().items()
    assert name == '0'
    assert layer.num_samples == 3
    torch.testing.assert_close(layer.mean, x.mean((0, 2, 3)))
    torch.testing.assert_close(layer.std, x.std((0, 2, 3), unbiased=False))
    torch.testing.assert_close(layer.active_share, (x > 0).double().mean((0, 2, 3)))
    assert layer.dead_share.tolist() == [0, 1, pytest.approx(1 / 3), 0]
    assert layer.dead_channels == 0.25
    assert layer.sigma_mu == pytest.approx(x.mean((0, 2, 3)).std(unbiased=False).item())
    std = x.std((0, 2, 3), unbiased=False)
    assert layer.sigma_sigma == pytest.approx(std.std(unbiased=False).item())
    rms = x.square().mean().sqrt().item()
    assert layer.stat_spread == pytest.approx(math.hypot(layer.sigma_mu, layer.sigma_sigma) / rms)
    shares = (2 * (x > 0).double().mean((0, 2, 3))).clamp(max=1)
    assert layer.singularity_distance == pytest.approx(shares.mean().item())


def test_every_relu_is_found_and_named():
    model = nn.Sequential(Relus(), nn.Flatten(), nn.Linear(8, 2), nn.ReLU())
    x = torch.randn(2, 2, 2, 2)
    expected = model(x)
    with ActivationObserver(model) as seen:
        for _ in range(2):
            actual = model(x)
    assert torch.equal(actual, expected)
    layers = seen.layers()
    assert list(layers) == ['0.relu (1)', '0.relu (2)', '0 (1)', '0 (2)', '0 (3)', '3']
    assert {layer.num_samples for layer in layers.values()} == {4}
    torch.testing.assert_close(layers['0.relu (2)'].mean, 2 * layers['0 (1)'].mean)
    assert layers['3'].mean.shape == (2,)


def test_nothing_is_watched_outside():
    model = nn.Sequential(nn.ReLU())
    observer = ActivationObserver(model)
    model(torch.randn(2, 3))
    with observer:
        pass
    model(torch.randn(2, 3))
    assert observer.layers() == {}
    assert not model._forward_hooks and not model[0]._forward_hooks
    with pytest.raises(ValueError, match='did the model run'):
        singularities(observer.layers())


def test_an_error_inside_leaves_no_hook():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    with pytest.raises(RuntimeError), ActivationObserver(model) as seen:
        model(torch.randn(2, 4))
    assert not model[0]._forward_pre_hooks
    with seen:
        model(torch.randn(2, 3))
    assert list(seen.layers()) == ['1']


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_repeated_pass_counts_once(reentrant):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with ActivationObserver(model) as seen, EstimateObserver(model) as estimates:
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    assert {n: layer.num_samples for n, layer in seen.layers().items()} == {'2': 2}
    torch.testing.assert_close(
        estimates.layers()['1'].mean.float(), model[0](x).mean((0, 2, 3)).detach()
    )


def test_empty_and_half_inputs():
    model = nn.Sequential(nn.ReLU())
    with ActivationObserver(model) as seen:
        model(torch.empty(0, 3, 2, 2))
        model(torch.full((1, 3, 200, 200), 300.0, dtype=torch.float16))
    layer = seen.layers()['0']
    assert layer.num_samples == 1
    assert layer.mean.tolist() == [300, 300, 300]
    assert layer.std.tolist() == [0, 0, 0]


def test_batch_norm_is_farther_from_singularities_than_shifted_channels():
    torch.manual_seed(0)
    x = torch.randn(8, 16, 4, 4) + torch.linspace(-4, 4, 16).view(1, -1, 1, 1)
    values = {}
    for norm in (nn.BatchNorm2d(16), nn.GroupNorm(1, 16)):
        model = nn.Sequential(norm, nn.ReLU())
        with ActivationObserver(model) as seen:
            model(x)
        values[type(norm)] = singularities(seen.layers())
    bn, gn = values[nn.BatchNorm2d], values[nn.GroupNorm]
    assert bn['dead_channels'] == 0 < gn['dead_channels']
    assert bn['stat_spread'] < 1e-3 < 0.5 < gn['stat_spread']
    assert bn['singularity_distance'] > 0.9 > 0.7 > gn['singularity_distance']


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, lambda c: BatchChannelNorm2d(c, 2)])
def test_gap_of_the_estimates(norm):
    torch.manual_seed(0)
    model = nn.Sequential(norm(4), nn.ReLU()).eval()
    bn = getattr(model[0], 'bn', model[0])
    x = torch.randn(6, 4, 5, 5) * 2 + 3
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
    bn.running_mean.copy_(mean + torch.tensor([0, 0.4, 0.6, 0]) * var.sqrt())
    bn.running_var.copy_(var * torch.tensor([1, 1, 1, 4.0]))
    with EstimateObserver(model) as seen:
        for image in x:
            model(image[None])
    ((name, layer),) = seen.layers().items()
    assert name == '0'
    torch.testing.assert_close(
        layer.mean_gap.float(), torch.tensor([0, 0.4, 0.6, 0]), rtol=1e-3, atol=1e-4
    )
    torch.testing.assert_close(
        layer.std_ratio.float(), torch.tensor([1.0, 1, 1, 2]), rtol=1e-3, atol=0
    )
    assert layer.drifts.tolist() == [False, False, True, True]
    gaps = estimate_gaps(seen.layers())
    assert gaps['drift_share'] == 0.5
    assert gaps['mean_gap'] == pytest.approx(0.25, rel=1e-3)
    assert gaps['std_gap'] == pytest.approx(math.log(2) / 4, rel=1e-3)


def test_models_without_estimates_have_no_gap():
    model = nn.Sequential(nn.GroupNorm(2, 4), nn.BatchNorm2d(4, track_running_stats=False))
    with EstimateObserver(model) as seen:
        model(torch.randn(2, 4, 3, 3))
    assert seen.layers() == {}
    with pytest.raises(ValueError, match='running statistics'):
        estimate_gaps({})


@pytest.mark.parametrize('formula', ['paper', 'std_eps', 'var_eps'])
@pytest.mark.parametrize('transposed', [False, True])
def test_gradient_of_the_weight_against_its_bound(formula, transposed):
    torch.manual_seed(0)
    kind = WSConvTranspose2d if transposed else WSConv2d
    conv = kind(4, 6, 3, groups=2, formula=formula, bias=False).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    cotangent = torch.randn(conv(x).shape, dtype=torch.float64)
    model = nn.Sequential(conv)
    with WeightGradientObserver(model) as seen:
        for part, c in zip(x.split(1), cotangent.split(1)):  # two backward passes add up
            (model(part) * c).sum().backward()
    found = seen.layers()['0']
    assert found.norm == pytest.approx(conv.weight.grad.norm().item(), rel=1e-10)
    # By hand: the gradient at the standardized weight, filter by filter.
    w_hat = conv.standardized_weight().detach().requires_grad_()
    run = F.conv_transpose2d if transposed else F.conv2d
    (g,) = torch.autograd.grad((run(x, w_hat, groups=2) * cotangent).sum(), w_hat)
    bound = 0.0
    for o in range(6):
        if transposed:
            pick = slice(o // 3 * 2, o // 3 * 2 + 2), o % 3
        else:
            pick = o
        w, gradient = conv.weight.detach()[pick], g[pick]
        d = {
            'paper': (w.var(unbiased=False) + 1e-5).sqrt(),
            'std_eps': w.std() + 1e-5,
            'var_eps': (w.var() + 1e-5).sqrt(),
        }[formula]
        bound += (gradient.norm() / d).item() ** 2
    assert found.bound == pytest.approx(bound**0.5, rel=1e-9)
    assert 0 < found.ratio < 1


def test_gradient_observer_leaves_the_model_alone():
    conv = WSConv2d(3, 4, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(4, 2, 1))
    x = torch.randn(1, 3, 5, 5)
    model(x).square().sum().backward()
    expected = conv.weight.grad.clone()
    model.zero_grad()
    with WeightGradientObserver(model) as seen:
        model(x).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad, expected)
    layers = seen.layers()
    assert layers['2'].bound is None and layers['2'].ratio is None and layers['2'].norm > 0
    assert not conv.standardized_hooks
    model(x).sum().backward()
    assert seen.layers() == layers


def quadratic(curvature):
    """A model whose loss is curvature / 2 |w|², and the loss."""
    model = nn.Linear(4, 1, bias=False).double()
    return model, lambda: curvature / 2 * model.weight.square().sum()


def test_smoothness_of_a_quadratic():
    model, loss = quadratic(3.0)
    start = model.weight.detach().clone()
    found = smoothness(model, loss, 0.1, factors=(0.5, 2))
    size = start.norm().item()
    assert found.loss == pytest.approx(1.5 * size**2)
    assert found.gradient_norm == pytest.approx(3 * size)
    assert found.step_sizes == pytest.approx([0.05, 0.2])
    assert found.losses == pytest.approx([1.5 * (size * 0.85) ** 2, 1.5 * (size * 0.4) ** 2])
    assert found.gradient_distances == pytest.approx([3 * 0.15 * size, 3 * 0.6 * size])
    assert found.beta == pytest.approx(3)  # the curvature, at every distance
    assert found.loss_range == pytest.approx(1.5 * size**2 * (0.85**2 - 0.4**2))
    assert torch.equal(model.weight, start)
    assert model.weight.grad is None


def test_smoothness_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        WSConv2d(3, 4, 3), BatchChannelNorm2d(4, 2), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 1, 1)
    ).train()
    x = torch.randn(2, 3, 6, 6)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    found = smoothness(model, lambda: model(x).square().mean(), 1e-12, factors=(1,))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert torch.equal(torch.get_rng_state(), state)
    assert not model[1].counts.any()
    # Same dropout, same estimates: a step of nothing changes nothing.
    assert found.losses[0] == pytest.approx(found.loss, rel=1e-6)
    assert found.gradient_distances[0] < 1e-5 * found.gradient_norm


def test_smoothness_puts_back_after_an_error():
    model, loss = quadratic(1.0)
    start, calls = model.weight.detach().clone(), []

    def fails():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError('out of memory')
        return loss()

    with pytest.raises(RuntimeError):
        smoothness(model, fails, 0.1)
    assert torch.equal(model.weight, start)


@pytest.mark.parametrize(
    'arguments',
    [dict(step_size=0), dict(step_size=1, factors=()), dict(step_size=1, factors=(1, -1))],
)
def test_smoothness_refuses(arguments):
    model, loss = quadratic(1.0)
    with pytest.raises(ValueError, match='positive'):
        smoothness(model, loss, **arguments)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match='require a gradient'):
        smoothness(model, loss, 0.1)
