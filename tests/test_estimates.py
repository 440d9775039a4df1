"""Estimates that cannot be poisoned, and inputs at the edge: training goes on, gradients finite."""

import math

import pytest
import torch

from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    WSConv2d,
    distributed,
    reference,
)
from wsbcn_mm.estimates import layers_of, skipped_updates, synchronize_estimates

C, G = 8, 2
INF, NAN = math.inf, math.nan


def norm(mode='estimate', dtype=torch.float32, momentum=0.1):
    torch.manual_seed(0)
    layer = BatchChannelNorm2d(C, G, mode=mode, momentum=momentum)
    torch.nn.init.normal_(layer.batch_weight)
    torch.nn.init.normal_(layer.bn.running_mean)
    return layer.to(dtype)


def image(samples=2, dtype=torch.float32, layout=torch.contiguous_format):
    x = torch.randn(samples, C, 5, 6, generator=torch.Generator().manual_seed(1)) * 2 + 1
    return x.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize('value', [INF, -INF, NAN])
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('samples', [1, 3])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_a_damaged_channel_keeps_its_estimates_and_the_others_go_on(
    backend, value, mode, samples, layout
):
    layer, x = norm(mode), image(samples, layout=layout)
    before = layer.bn.running_mean.clone(), layer.bn.running_var.clone()
    x[samples - 1, 3, 2, 2] = value
    _, mean, var = reference.batch_channel_norm(
        x.double(), G, *(b.double() for b in before), training=True, mode=mode, momentum=0.1
    )
    layer(x)
    torch.testing.assert_close(layer.bn.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bn.running_var.double(), var, rtol=1e-5, atol=1e-5)
    kept = torch.tensor([c == 3 for c in range(C)])
    for old, new in zip(before, (layer.bn.running_mean, layer.bn.running_var)):
        assert torch.equal(old == new, kept)
    assert layer.counts.tolist() == [
        [samples * (c != 3) for c in range(C)],
        [int(c == 3) for c in range(C)],
    ]
    assert skipped_updates(layer) == {'': 1}
    layer(image())  # and the next step is as ever
    assert layer.bn.running_mean.isfinite().all()
    assert layer.bn.running_mean[3] != before[0][3]


def test_the_normalisation_uses_the_kept_estimates(backend):
    """Where one of two samples is damaged, the other's result is still right."""
    layer, x = norm(), image()
    x[1, 3] = INF
    y = layer(x)
    expected = reference.normalize(
        x[:1].double(),
        layer.bn.running_mean.double(),
        layer.bn.running_var.double(),
        G,
        layer.batch_weight.double(),
        layer.batch_bias.double(),
    )
    torch.testing.assert_close(y[:1].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_a_variance_that_does_not_fit_is_left_out(backend, mode):
    """Finite values whose squares are not: 1e20 squared is beyond float32."""
    layer, x = norm(mode), image()
    before = layer.bn.running_var.clone()
    x[0, 2, 0, 0], x[0, 2, 1, 1] = 1e20, -1e20
    layer(x)
    assert layer.bn.running_var.isfinite().all()
    assert layer.bn.running_var[2] == before[2]
    assert layer.counts[1].tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize('dtype, large', [(torch.float16, 1e4), (torch.bfloat16, 1e19)])
def test_buffers_in_half_precision_hold_what_fits(backend, dtype, large):
    """``model.half()``: the estimates' own dtype decides what is finite."""
    layer = norm(momentum=0.5, dtype=dtype)
    x = image(dtype=dtype)
    x[:, 1] = torch.tensor([large, -large], dtype=dtype)[:, None, None]
    before = layer.bn.running_var.clone()
    layer(x)
    assert layer.bn.running_var.isfinite().all()
    kept = 0.5 * large**2 > torch.finfo(dtype).max
    assert kept == (dtype is torch.float16)
    assert (layer.bn.running_var[1] == before[1]) == kept
    assert layer.counts[1].tolist() == [0, int(kept), *[0] * (C - 2)]


def test_cumulative_and_tensor_rates_are_safe_too(backend):
    layer, x = norm(momentum='cumulative'), image()
    x[0, 0, 0, 0] = NAN
    layer(x)
    layer(image())
    assert layer.bn.running_mean.isfinite().all()
    assert layer.counts[1].tolist() == [1, *[0] * (C - 1)]


def test_what_was_left_out_is_told_by_name():
    model = torch.nn.Sequential(WSConv2d(3, C, 3), norm(), torch.nn.Sequential(norm('batch')))
    assert list(layers_of(model)) == ['1', '2.0']
    x = torch.randn(1, 3, 8, 8)
    model(x)
    assert skipped_updates(model) == {}
    model(x * INF)
    assert skipped_updates(model) == {'1': 1, '2.0': 1}
    assert skipped_updates(WSConv2d(3, C, 3)) == {}
    assert 'counts' not in ''.join(model.state_dict())
    model[1].reset_parameters()
    assert skipped_updates(model) == {'2.0': 1}


def test_a_model_on_several_devices(monkeypatch):
    """What is computed over all layers goes to one of them, and back; with fake tensors."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    reduced = []
    monkeypatch.setattr(distributed, 'world_size', lambda group=None: 2)
    monkeypatch.setattr(
        torch.distributed, 'all_reduce', lambda tensor, group: reduced.append(tensor.device)
    )
    with FakeTensorMode():
        parts = [
            BatchChannelNorm2d(C, G, momentum=momentum, device=device)
            for device, momentum in (('cpu', 'cumulative'), ('cuda:0', 1.0), ('cuda:1', 0.1))
        ]
        model = torch.nn.Sequential(*parts)
        # Of the two that average one number more per channel.
        assert synchronize_estimates(model) == 4 * (3 * 3 + 2) * C
        assert reduced == [torch.device('cuda:0')] * 2
        with pytest.raises(DataDependentOutputException):  # it comes as far as a value
            skipped_updates(model)
        sums = distributed.sum_over_ranks([part.bn.running_mean for part in parts])
        assert [s.device.type for s in sums] == ['cpu', 'cuda', 'cuda']


def test_ranks_share_nothing_of_a_batch_norm_that_a_host_froze(monkeypatch):
    model = torch.nn.Sequential(norm(), norm())
    model[1].bn = frozen = torch.nn.Module()  # trains, and has statistics and no rate
    for name in ('running_mean', 'running_var'):
        frozen.register_buffer(name, torch.ones(C))
    monkeypatch.setattr(distributed, 'world_size', lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda tensor, group: None)
    assert synchronize_estimates(model) == 4 * 3 * C


# ----------------------------------------------------------------------------------------------
# Inputs at the edge

EDGES = {
    'constant channel': lambda x: x.index_fill(1, torch.tensor([2]), 4.0),
    'constant image': lambda x: torch.full_like(x, 3.0),
    'zeros': torch.zeros_like,
    'one value per channel': lambda x: x[:1, :, :1, :1],
    'one column': lambda x: x[:, :, :, :1],
    'no image': lambda x: x[:0],
    'scale 1e-6': lambda x: x * 1e-6,
    'scale 1e6': lambda x: x * 1e6,
    'mean 1e4': lambda x: x + 1e4,
    'mean -1e4, scale 1e-2': lambda x: x * 1e-2 - 1e4,
}


@pytest.mark.parametrize('edge', EDGES)
@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_training_goes_on_with_finite_gradients(backend, mode, edge):
    layer = norm(mode)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    for step in range(20):
        x = EDGES[edge](image() + 0.01 * step).requires_grad_()
        y = layer(x)
        optimizer.zero_grad()
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(step))
        (y * weights).sum().backward()
        optimizer.step()
        for tensor in (y, x.grad, *(p.grad for p in layer.parameters()), *layer.parameters()):
            assert tensor.isfinite().all()
    for buffer in layer.buffers():
        assert buffer.isfinite().all()
    assert not layer.counts[1].any()
    layer.eval()
    assert layer(EDGES[edge](image())).isfinite().all()


@pytest.mark.parametrize('formula', ['paper', 'std_eps', 'var_eps'])
def test_a_zero_filter_trains_on(backend, formula):
    conv, layer = WSConv2d(3, C, 3, formula=formula), norm()
    with torch.no_grad():
        conv.weight[1] = 0
        conv.weight[2] = 1e-20
    optimizer = torch.optim.SGD([*conv.parameters(), *layer.parameters()], 1e-3)
    for step in range(10):
        x = torch.randn(1, 3, 7, 7, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        layer(conv(x)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(conv.parameters(), 1.0)
        optimizer.step()
        for p in (*conv.parameters(), *layer.parameters()):
            assert p.grad.isfinite().all()
            assert p.isfinite().all()


def test_a_pooled_value_per_channel(backend):
    """An image pooling branch at one image: (1, C, 1, 1), and (N, C) rows."""
    for x in (torch.randn(1, C, requires_grad=True), torch.randn(1, C, 1, requires_grad=True)):
        layer = BatchChannelNorm1d(C, G)
        y = layer(x)
        (y * torch.randn(y.shape)).sum().backward()
        assert x.grad.isfinite().all()


def test_statistics_that_are_reset_have_taken_in_nothing():
    """The counts are the weight of a rank in the next synchronisation; who loads may put back."""
    layer = norm()
    layer(image())
    layer.load_state_dict(layer.state_dict())
    assert layer.counts[0].all()
    layer.bn.reset_running_stats()
    assert not layer.counts[0].any()
