"""Activation checkpointing (trap 8): the same gradients, and one update of the statistics."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import BatchChannelNorm2d, WSConv2d

MODES = ('estimate', 'batch')


def make(mode, momentum=0.3):
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(4, 4, 3, padding=1),
        BatchChannelNorm2d(4, 2, mode=mode, momentum=momentum),
        nn.ReLU(inplace=True),
    ).double()


def train(net, use_reentrant, uses, steps=3, micro_steps=2):
    """Everything a run leaves behind; use_reentrant None: without checkpointing."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    left = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro_steps):
            x = torch.randn(2, 4, 5, 5, dtype=torch.float64, generator=generator) * 2 + 1
            y = x.requires_grad_()
            for _ in range(uses):
                y = (
                    net(y)
                    if use_reentrant is None
                    else checkpoint(net, y, use_reentrant=use_reentrant)
                )
            y.backward(torch.randn(y.shape, dtype=y.dtype, generator=generator))
            left.append(x.grad)
        left += [p.grad.clone() for p in net.parameters()]
        optimizer.step()
    return left + [b.clone() for b in net.buffers()]


@pytest.mark.parametrize('uses', [1, 3])
@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('momentum', [0.3, 'cumulative'])
@pytest.mark.parametrize('mode', MODES)
def test_checkpointing_changes_nothing(mode, momentum, use_reentrant, uses):
    plain = train(make(mode, momentum), None, uses)
    checkpointed = train(make(mode, momentum), use_reentrant, uses)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_several_uses_in_one_segment(use_reentrant):
    def run(wrap):
        net = make('estimate')
        x = torch.randn(1, 4, 6, 6, dtype=torch.float64).requires_grad_()
        wrap(lambda x: net(net(net(x) + x)), x).square().sum().backward()
        return [x.grad, *[p.grad for p in net.parameters()], *net.buffers()]

    torch.manual_seed(3)
    plain = run(lambda f, x: f(x))
    torch.manual_seed(3)
    found = run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_two_forward_passes_before_the_backward_passes(use_reentrant):
    """The first one's repetition comes after the second one has moved the estimates on."""

    def run(wrap):
        net = make('estimate')
        x, y = torch.randn(2, 2, 4, 5, 5, dtype=torch.float64).requires_grad_().unbind()
        a, b = wrap(net, x), wrap(net, y + 1)
        (a.square().sum() + b.square().sum()).backward()
        return [*[p.grad for p in net.parameters()], *net.buffers()]

    torch.manual_seed(3)
    plain = run(lambda f, x: f(x))
    torch.manual_seed(3)
    found = run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(found, plain, rtol=1e-11, atol=1e-11)


def test_nothing_is_remembered_without_checkpointing():
    net = make('estimate')
    net(torch.randn(1, 4, 5, 5, dtype=torch.float64)).sum().backward()
    assert len(net[1]._history._runs) == 0


def test_what_is_remembered_is_bounded():
    net = make('estimate')
    with torch.no_grad():
        for _ in range(100):
            net(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert len(net[1]._history._runs) == 64


def test_copies_and_pickles_forget():
    net = make('estimate')
    with torch.no_grad():
        net(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert len(other[1]._history._runs) == 0
