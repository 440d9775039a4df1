"""Counts are of one process and no state: made where the statistics are, never lost or garbage."""

import copy
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.estimates import skipped_updates


def net():
    torch.manual_seed(0)
    return nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model):
    model.train()(X).square().sum().backward()
    return [
        model[1].bn.running_mean,
        model[1].bn.running_var,
        model[1].counts,
        model[0].weight.grad,
    ]


@pytest.mark.parametrize('how', ['assign', 'to_empty'])
def test_a_model_made_on_meta_trains_as_one_made_on_the_cpu(how):
    source = net()
    expected = train(copy.deepcopy(source))
    with torch.device('meta'):
        model = net()
    if how == 'to_empty':
        model.to_empty(device='cpu')
    model.load_state_dict(source.state_dict(), assign=how == 'assign')
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers(), model[1].counts))
    for actual, wanted in zip(train(model), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_a_model_made_among_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    source = net()
    with FakeTensorMode():
        model = net().apply(lambda module: None)
        assert model(torch.empty(2, 3, 6, 6)).shape == (2, 8, 4, 4)
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=True)
    for actual, wanted in zip(train(model), train(source), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize('part', ['layer', 'bn', 'input'])
def test_devices_must_agree(part):
    norm, x = BatchChannelNorm2d(8, 4), torch.randn(1, 8, 3, 3)
    if part == 'input':
        x = x.to('meta')
    else:
        (norm if part == 'layer' else norm.bn).to('meta')
    for training in (True, False):
        with pytest.raises(RuntimeError, match='the input is on'):
            norm.train(training)(x)


@pytest.mark.parametrize('name', ['weight', 'bias', 'batch_weight', 'batch_bias', 'running_var'])
def test_a_parameter_without_values_is_refused(backend, device, name):
    for mode in ('estimate', 'batch'):
        norm = BatchChannelNorm2d(8, 4, mode=mode, device=device)
        owner = norm.bn if name == 'running_var' else norm
        empty = getattr(owner, name).detach().to('meta')
        setattr(owner, name, empty if owner is norm.bn else torch.nn.Parameter(empty))
        for training, recording in product((True, False), repeat=2):
            with torch.set_grad_enabled(recording):
                # The message is torch's own where the backend is made of its calls.
                with pytest.raises((ValueError, RuntimeError), match='meta'):
                    norm.train(training)(torch.randn(2, 8, 3, 3, device=device))


def test_they_go_where_the_layer_goes_and_come_along_in_copies():
    norm = net()
    norm(X * torch.tensor(float('inf')))
    assert skipped_updates(norm) == {'1': 1}
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), norm.double().float()):
        assert skipped_updates(other) == {'1': 1}
        assert other[1].counts.dtype == torch.int64
    assert not [name for name, _ in norm.named_buffers() if 'counts' in name]
    norm.to('meta')
    assert norm[1].counts.is_meta


def test_channels_may_be_pruned():
    """As tools that prune do it: every parameter and statistic is replaced by a shorter one."""
    norm, kept = BatchChannelNorm2d(8, 4, affine='channel'), [0, 1, 4, 5]
    for name, parameter in list(norm.named_parameters()):
        setattr(norm, name, torch.nn.Parameter(parameter.detach()[kept]))
    for name in ('running_mean', 'running_var'):
        setattr(norm.bn, name, getattr(norm.bn, name)[kept])
    norm.num_groups, norm.num_channels, norm.bn.num_features = 2, 4, 4
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(norm(x), BatchChannelNorm2d(4, 2, affine='channel')(x))
    assert norm.counts.shape == (2, 4)


def test_swapping_conversion():
    """torch.__future__: parameters are swapped in place, which nothing else may refer to."""
    model = net()
    model(X).sum().backward()
    model.zero_grad()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model[1].double()
        model[1].load_state_dict(BatchChannelNorm2d(8, 4).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model[1](torch.randn(1, 8, 3, 3, dtype=torch.float64)).dtype == torch.float64


def test_groups_that_do_not_fit_any_more(backend):
    norm = BatchChannelNorm2d(8, 4, affine=None)
    norm.num_groups = 3
    with pytest.raises(ValueError, match='num_groups'):
        norm(torch.randn(2, 8, 4, 4))
