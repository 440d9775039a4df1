"""Activation checkpointing (trap 8): the same gradients, and one update of the statistics."""

import contextlib
import functools
import gc
import threading

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, compat
from wsbcn_mm.layers import recomputation

MODES = ('estimate', 'batch')
INPUT = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(5)).double() * 2 + 1


def make(mode, momentum=0.3):
    torch.manual_seed(0)
    return nn.Sequential(
        WSConv2d(4, 4, 3, padding=1),
        BatchChannelNorm2d(4, 2, mode=mode, momentum=momentum),
        nn.ReLU(inplace=True),
    ).double()


def plain(function, x):
    return function(x)


def wrapped(use_reentrant):
    return lambda function, x: checkpoint(function, x, use_reentrant=use_reentrant)


def left_by(net, x):
    """What a run leaves behind; copies."""
    norm = next(m for m in net.modules() if isinstance(m, BatchChannelNorm2d))
    left = [x.grad, *(p.grad for p in net.parameters()), *net.buffers(), norm.counts]
    return [value.clone() for value in left]


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


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
def test_where_torch_cannot_be_asked_for_hooks(monkeypatch, use_reentrant):
    """Before torch 2.8: what may be repeated is not known in advance, all is remembered."""
    monkeypatch.setattr(compat, 'TOP_HOOKS', None)
    assert_same(train(make('batch'), use_reentrant, 2), train(make('batch'), None, 2))


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


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('latest_first', [True, False])
def test_the_same_input_twice(use_reentrant, latest_first):
    """R-Drop: nothing but the order tells the two uses apart; their statistics differ."""

    def run(wrap):
        net = make('estimate')
        x = INPUT.clone().requires_grad_()
        losses = [wrap(net, x).pow(3).sum() for _ in range(2)]
        for loss in reversed(losses) if latest_first else losses:
            loss.backward()
        return left_by(net, x)

    assert_same(run(wrapped(use_reentrant)), run(plain))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_many_uses_of_one_layer(use_reentrant):
    def run(wrap):
        net = make('estimate')
        x = torch.randn(70, 1, 4, 3, 3, generator=torch.Generator().manual_seed(2)).double()
        x.requires_grad_()
        sum(wrap(net, part).pow(3).sum() for part in x.unbind()).backward()
        return left_by(net, x)

    assert_same(run(wrapped(use_reentrant)), run(plain))


@pytest.mark.parametrize('outer', [True, False])
@pytest.mark.parametrize('inner', [True, False])
def test_checkpoints_in_checkpoints(outer, inner):
    def run(out, into):
        nets = make('estimate'), make('estimate')
        x = INPUT.clone().requires_grad_()
        y = out(lambda x: nets[0](into(nets[1], into(nets[1], nets[0](x)))), x)
        out(nets[1], y).pow(3).sum().backward()
        return [*left_by(nets[0], x), *left_by(nets[1], x)]

    assert_same(run(wrapped(outer), wrapped(inner)), run(plain, plain))


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_a_graph_that_is_used_twice(use_reentrant):
    def run(wrap):
        net = make('estimate')
        x = INPUT.clone().requires_grad_()
        y = wrap(lambda x: net(net(x)), x)
        y[:, 0].sum().backward(retain_graph=True)
        net(x.detach() + 1)  # the estimates move on in between
        y.pow(3).sum().backward()
        return left_by(net, x)

    expected = run(plain)
    for early in (True, False):
        with set_checkpoint_early_stop(early):
            assert_same(run(wrapped(use_reentrant)), expected)


def test_a_part_of_a_checkpoint_is_repeated():
    """As far as its gradients ask for; and gradients inside of the checkpointed function."""

    def run(wrap):
        net = make('estimate')
        x = INPUT.clone().requires_grad_()

        def function(x):
            first = net(x)
            (grad,) = torch.autograd.grad(first.pow(3).sum(), x, create_graph=True)
            return first, net(first + grad)

        first, second = wrap(function, x)
        first.pow(2).sum().backward(retain_graph=True)
        second.pow(2).sum().backward()
        return left_by(net, x)

    assert_same(run(wrapped(False)), run(plain))


class Recomputed(torch.autograd.Function):
    """What reversible networks and other people's checkpointing do."""

    @staticmethod
    def forward(ctx, net, x, *parameters):
        ctx.net = net
        ctx.save_for_backward(x)
        return net(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.net(x)
        return None, *torch.autograd.grad(y, (x, *ctx.net.parameters()), grad)


@pytest.mark.parametrize('mode', MODES)
def test_functions_that_run_layers_again_in_their_backward_method(mode):
    def run(wrap):
        net = make(mode)
        x = INPUT.clone().requires_grad_()
        (wrap(net, x).sum() + wrap(net, x + 1).pow(3).sum()).backward()
        return left_by(net, x)

    assert_same(run(lambda net, x: Recomputed.apply(net, x, *net.parameters())), run(plain))


@pytest.mark.parametrize('kind', [None, True, False])
@pytest.mark.parametrize('place', ['hook', 'method'])
def test_a_first_run_inside_a_backward_pass_updates(place, kind):
    """In a hook, or in somebody's backward method; itself checkpointed, or not."""
    net, other, seen = make('estimate'), make('estimate'), []
    wrap = plain if kind is None else wrapped(kind)

    def first_run(grad):
        with torch.enable_grad():
            z = (grad.detach() + 2).requires_grad_()
            wrap(other, z).pow(3).sum().backward()
        seen.append((z.detach(), z.grad))
        return grad

    class Calls(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return first_run(grad)

    x = INPUT.clone().requires_grad_()
    y = wrapped(False)(net, x)
    if place == 'hook':
        y.register_hook(first_run)
    else:
        y = Calls.apply(y)
    y.pow(2).sum().backward()
    (z, grad), expected = seen[0], make('estimate')
    z.requires_grad_()
    expected(z).pow(3).sum().backward()
    assert_same([grad, *other.buffers()], [z.grad, *expected.buffers()])
    assert net[1].bn.num_batches_tracked == other[1].bn.num_batches_tracked == 1


def test_what_cannot_be_known_is_said():
    net = make('estimate')
    x, uses = INPUT.clone().requires_grad_(), iter((1, 2))

    def function(x):
        for _ in range(next(uses)):
            x = net(x)
        return x

    y = checkpoint(function, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match='more often in the repetition'):
        y.sum().backward()
    net.eval()
    y = checkpoint(net, x, use_reentrant=False)
    net.train()
    with pytest.raises(RuntimeError, match='must be in the same mode'):
        y.sum().backward()


def test_without_gradients_nothing_is_copied_for_a_repetition_that_will_not_come():
    norm = BatchChannelNorm2d(4, 2)
    with torch.no_grad(), torch.profiler.profile() as profile:
        norm(torch.randn(2, 4, 3, 3))
    assert norm.counts[0].tolist() == [2] * 4
    assert 'aten::clone' not in [event.key for event in profile.key_averages()]


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_nothing_is_remembered_longer_than_the_graph(use_reentrant):
    gc.collect()
    net, before = make('estimate'), len(recomputation.remembered())
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            net(INPUT)
    assert len(recomputation.remembered()) == before
    y = checkpoint(net, INPUT.clone().requires_grad_(), use_reentrant=use_reentrant)
    assert len(recomputation.remembered()) == before + 1
    y.sum().backward()
    del y
    gc.collect()
    assert len(recomputation.remembered()) == before


def compiled(net):
    return torch.compile(net, backend='aot_eager', fullgraph=True)


def checkpointed(net):
    return lambda x: checkpoint(net, x, use_reentrant=False)


def recomputing(net):
    """The compiler itself decides to compute again instead of saving."""
    from torch._functorch import config

    function = compiled(net)

    def call(x):
        with config.patch(activation_memory_budget=0.0):
            return function(x)

    return call


@pytest.mark.parametrize(
    'wrap',
    [
        lambda net: compiled(checkpointed(net)),
        lambda net: checkpointed(compiled(net)),
        recomputing,
    ],
    ids=['compile(checkpoint)', 'checkpoint(compile)', 'budget 0'],
)
@pytest.mark.parametrize('mode', MODES)
def test_compiled_code_decides_when_it_runs(mode, wrap):
    def run(net, function):
        x = INPUT.clone().requires_grad_()
        for i in range(2):
            function(x + i).pow(3).sum().backward()
        return left_by(net, x)

    torch._dynamo.reset()
    net, expected = make(mode), make(mode)
    assert_same(run(net, wrap(net)), run(expected, expected))


def test_compiled_code_that_repeats_a_layer_used_twice():
    """Its order is the compiler's: inputs tell the uses apart, or it is said that they do not."""
    torch._dynamo.reset()

    def run(function, net):
        x = INPUT.clone().requires_grad_()
        function(x).pow(3).sum().backward()
        return left_by(net, x)

    net, expected = make('estimate'), make('estimate')
    found = run(compiled(checkpointed(lambda x: net(net(x)))), net)
    assert_same(found, run(lambda x: expected(expected(x)), expected))
    net, expected = make('estimate'), make('estimate')
    try:
        found = run(compiled(checkpointed(lambda x: net(x) + net(x).square())), net)
    except RuntimeError as error:
        if 'twice with the same input' not in str(error):
            raise
    else:  # the compiler of torch 2.11 repeats nothing here
        assert_same(found, run(lambda x: expected(x) + expected(x).square(), expected))


SAVED = {
    'convolutions': lambda name: name in ('aten.convolution.default', 'aten.relu.default'),
    'what this package computes': lambda name: name.startswith('wsbcn_mm.'),
    'all but memory': lambda name: 'empty' not in name,
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('saved', SAVED)
def test_selective_checkpointing_repeats_what_was_not_saved(saved, mode):
    """In batch mode, whose repetition takes copies, torch may say that operations differ."""

    def policy(_, operator, *args, **kwargs):
        found = SAVED[saved](str(operator))
        return CheckpointPolicy.MUST_SAVE if found else CheckpointPolicy.PREFER_RECOMPUTE

    def selective(net, x):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(net, x, use_reentrant=False, context_fn=contexts)

    def run(wrap):
        net, x = make(mode), INPUT.clone().requires_grad_()
        net[2].inplace = False  # what is kept must not be edited, torch says
        wrap(net, x).pow(3).sum().backward()
        return left_by(net, x)

    try:
        left = run(selective)
    except RuntimeError as error:
        if mode != 'batch' or 'encountered during backward' not in str(error):
            raise
    else:
        assert_same(left, run(plain))


def deep():
    return nn.Sequential(make('estimate'), make('batch'), make('estimate'))


WAYS = {
    'sequential': lambda net, x: checkpoint_sequential(net, 3, x, use_reentrant=False),
    'sequential, reentrant': lambda net, x: checkpoint_sequential(net, 3, x, use_reentrant=True),
    'wrapper': lambda net, x: checkpoint_wrapper(net)(x),
    'wrapper, reentrant': lambda net, x: checkpoint_wrapper(net, CheckpointImpl.REENTRANT)(x),
}


@pytest.mark.parametrize('autocast', [True, False])
@pytest.mark.parametrize('elsewhere', [True, False], ids=['other thread', 'same thread'])
@pytest.mark.parametrize('way', WAYS)
def test_what_torch_has_around_checkpoints(way, elsewhere, autocast):
    """Its helpers, a backward pass in another thread, autocast (in which both runs compute)."""

    def run(wrap):
        net, x = deep(), INPUT.clone()
        if autocast:
            net, x = net.float(), x.float()
        x.requires_grad_()
        for shift in (0, 1):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                loss = wrap(net, x + shift).pow(3).sum()
            if elsewhere:
                thread = threading.Thread(target=loss.backward)
                thread.start()
                thread.join()
            else:
                loss.backward()
        return left_by(net, x)

    assert_same(run(WAYS[way]), run(plain))


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('fails_at', [1, 2], ids=['forward', 'repetition'])
def test_training_goes_on_after_an_exception(fails_at, use_reentrant):
    """As it does without checkpointing after a step whose backward pass was left out."""

    def run(wrap):
        net, x = make('estimate'), INPUT.clone().requires_grad_()
        runs = iter(range(1, 9))

        def fails(x):
            y = net(x)
            if wrap is not plain and next(runs) == fails_at:
                raise InterruptedError
            return y

        with contextlib.suppress(InterruptedError), set_checkpoint_early_stop(False):
            loss = wrap(fails, x).sum()
            if wrap is not plain:
                loss.backward()
                pytest.fail('it has been run to its end')
        for shift in (1, 2):
            wrap(net, x + shift).pow(3).sum().backward()
        return left_by(net, x)

    assert_same(run(wrapped(use_reentrant)), run(plain))
