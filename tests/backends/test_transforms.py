"""What torch does with a function besides running it backwards: forward mode, torch.func, sizes."""

import contextlib
import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import conv2d

from wsbcn_mm import (
    BatchChannelNorm2d,
    WSConv2d,
    reference,
    standardize_once_per_forward,
    standardized_once,
    weight_standardize,
    weights_do_not_change,
)
from wsbcn_mm.backends import cpu


def make_norm(mode='estimate'):
    torch.manual_seed(0)
    norm = BatchChannelNorm2d(8, 4, mode=mode).double()
    with torch.no_grad():
        for value in (*norm.parameters(), norm.bn.running_mean):
            value.normal_()
        norm.bn.running_var.uniform_(0.5, 2)
    return norm


def by_reference(norm):
    """The layer as a function of x alone, in its present mode; the buffers stay."""
    affine = [p.detach() for p in (norm.batch_weight, norm.batch_bias, norm.weight, norm.bias)]
    buffers = norm.bn.running_mean.clone(), norm.bn.running_var.clone()
    settings = dict(training=norm.training, mode=norm.mode, momentum=norm.momentum)
    return lambda x: reference.batch_channel_norm(x, 4, *buffers, *affine, **settings)[0]


X = torch.randn(2, 8, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
T = torch.randn(2, 8, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('recording', [True, False])
@pytest.mark.parametrize('frozen', [True, False])
@pytest.mark.parametrize('mode', ['evaluate', 'estimate', 'batch'])
def test_forward_mode(backend, mode, frozen, recording):
    norm = make_norm('batch' if mode == 'batch' else 'estimate').requires_grad_(not frozen)
    norm.train(mode != 'evaluate')
    expected_run, other = by_reference(norm), make_norm(norm.mode).train(norm.training)
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        actual = forward_ad.unpack_dual(norm(forward_ad.make_dual(X, T)))
        expected = forward_ad.unpack_dual(expected_run(forward_ad.make_dual(X, T)))
    if mode == 'estimate':  # the estimates are constants
        (_, expected_tangent) = jvp(lambda x: fixed(other, x), (X,), (T,))
    else:
        expected_tangent = expected.tangent
    assert_close(actual.tangent.detach(), expected_tangent.detach())
    assert_close(actual.primal.detach(), expected.primal.detach())
    with torch.no_grad():
        other(X)
    assert_close(norm.bn.running_var, other.bn.running_var)  # updated once
    assert torch.equal(norm.counts, other.counts)


def fixed(norm, x):
    """Estimate mode with the estimates that x gives, as constants."""
    bn = norm.bn
    mean, var = reference.update_estimates(X, bn.running_mean, bn.running_var, norm.momentum)
    affine = [p.detach() for p in (norm.batch_weight, norm.batch_bias, norm.weight, norm.bias)]
    return reference.normalize(x, mean, var, 4, *affine)


@pytest.mark.parametrize('formula', ['paper', 'std_eps', 'var_eps'])
def test_forward_mode_of_a_weight(backend, formula):
    weight, tangent = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        actual = forward_ad.unpack_dual(weight_standardize(dual, formula=formula)).tangent
        expected = reference.weight_standardize(dual, formula=formula)
        assert_close(actual, forward_ad.unpack_dual(expected).tangent)


@pytest.mark.skipif(cpu.entries is None, reason='the C++ extension is not compiled')
@pytest.mark.parametrize('name', ['batch_channel_norm', 'weight_standardize'])
def test_the_operators_themselves_refuse_tangents(name):
    """What was traced calls them: a node in C++ would drop the tangent without a word."""
    running = torch.zeros(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64), None, None
    rest = dict(
        batch_channel_norm=(4, *running, None, None, None, None, None, None, 1e-5, False),
        weight_standardize=(1e-5, 'paper', torch.float64),
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X.clone().requires_grad_(), T)
        with pytest.raises(NotImplementedError, match=f'{name} has no forward-mode .*: call the'):
            getattr(torch.ops.wsbcn_mm, name).default(dual, *rest[name])


@pytest.mark.parametrize(
    'make, shape',
    [
        (lambda: BatchChannelNorm2d(8, 4), (2, 8, 3, 3)),
        (lambda: BatchChannelNorm2d(8, 4, mode='batch'), (2, 8, 3, 3)),
        (lambda: WSConv2d(8, 4, 3), (2, 8, 5, 5)),
    ],
    ids=['estimate', 'batch', 'WS'],
)
def test_tangents_that_come_with_a_gradient(backend, make, shape):
    """The forward pass knows of none: what a gradient is turned into is linear in it."""
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    inputs = [x, *layer.parameters()]
    grad, tangent = torch.randn_like(y), torch.randn_like(y)
    expected = torch.autograd.grad(y, inputs, tangent, retain_graph=True)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, inputs, forward_ad.make_dual(grad, tangent))
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in found]
    for a, b in zip(tangents, expected):
        torch.testing.assert_close(a, b)


@contextlib.contextmanager
def once_per_forward(net):
    undo = standardize_once_per_forward(net)
    yield
    undo()


SCOPES = [contextlib.nullcontext, standardized_once, weights_do_not_change, once_per_forward]


@pytest.mark.parametrize('scope', SCOPES, ids=['none', 'once', 'long', 'forward'])
@pytest.mark.parametrize('duals', ['weights', 'input'])
def test_forward_mode_inside_scopes(backend, scope, duals):
    """Tangents of weights, and of what is behind a weight, when its gradient is computed."""
    torch.manual_seed(0)
    net = nn.Sequential(WSConv2d(3, 8, 2), make_norm().eval(), WSConv2d(8, 4, 1)).double()
    x, tangent, c = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    c = torch.randn(2, 4, 4, 3, dtype=torch.float64)
    along = {n: torch.randn_like(p) for n, p in net.named_parameters()}

    def by_reference(parameters, x):
        get = lambda i, *names: [parameters[f'{i}.{name}'] for name in names]  # noqa: E731
        (w, b), (v, d) = get(0, 'weight', 'bias'), get(2, 'weight', 'bias')
        x = conv2d(x, reference.weight_standardize(w), b)
        statistics = net[1].running_statistics()
        affine = get(1, 'batch_weight', 'batch_bias', 'weight', 'bias')
        x = reference.normalize(x, *statistics, 4, *affine)
        return conv2d(x, reference.weight_standardize(v), d)

    def run(forward, parameters, x):
        y = forward(parameters, x)
        gradients = torch.autograd.grad((y * c).sum(), list(parameters.values()))
        return [forward_ad.unpack_dual(value).tangent for value in (y, *gradients)]

    with forward_ad.dual_level(), scope(net):
        net(x)  # results of a scope that there are
        parameters = dict(net.named_parameters())
        if duals == 'weights':
            parameters = {n: forward_ad.make_dual(p, along[n]) for n, p in parameters.items()}
        else:
            x = forward_ad.make_dual(x, tangent)
        actual = run(lambda p, x: functional_call(net, p, (x,)), parameters, x)
        expected = run(by_reference, parameters, x)
        assert_close(actual, expected)


@pytest.mark.parametrize('hooked', [True, False])
@pytest.mark.parametrize('scope', SCOPES[1:], ids=['once', 'long', 'forward'])
def test_transforms_inside_scopes(backend, scope, hooked):
    net = nn.Sequential(WSConv2d(3, 8, 2), make_norm().eval()).double()
    if hooked:
        net[0].register_forward_pre_hook(lambda *_: None)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    along = {n: torch.randn_like(p) for n, p in parameters.items()}
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    loss = lambda p: functional_call(net, p, (x,)).pow(3).sum()  # noqa: E731
    expected = jvp(grad(loss), (parameters,), (along,))
    with scope(net):
        net(x)
        assert_close(jvp(grad(loss), (parameters,), (along,)), expected)
        assert_close(vmap(lambda z: net(z[None])[0])(x), net(x))
        net(x).sum().backward()  # the weights still learn
    assert net[0].weight.grad is not None


@pytest.mark.parametrize(
    'transform',
    [
        lambda f: jvp(f, (X,), (T,))[1],
        lambda f: grad(lambda x: f(x).pow(3).sum())(X),
        lambda f: vmap(lambda x: f(x[None])[0])(X),
        lambda f: vmap(grad(lambda x: f(x[None]).pow(3).sum()))(X),
        lambda f: jacfwd(f)(X[:1, :, :1]),
        lambda f: jacrev(f)(X[:1, :, :1]),
        lambda f: hessian(lambda x: f(x).pow(3).sum())(X[:1, :, :1, :2]),
    ],
    ids=['jvp', 'grad', 'vmap', 'vmap grad', 'jacfwd', 'jacrev', 'hessian'],
)
def test_transforms_of_a_norm_in_evaluation(backend, transform):
    norm = make_norm().eval()
    assert_close(transform(norm), transform(by_reference(norm)))


def test_gradients_of_each_sample_and_ensembles(backend):
    conv, norm = WSConv2d(3, 8, 3).double(), make_norm().eval()
    net, x = nn.Sequential(conv, norm), torch.randn(3, 3, 5, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, sample):
        return functional_call(net, parameters, (sample[None],)).pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        net.zero_grad()
        net(sample[None]).pow(3).sum().backward()
        for name, p in net.named_parameters():
            assert_close(each[name][i], p.grad)

    norms = [make_norm().eval(), make_norm().eval()]
    with torch.no_grad():
        norms[1].weight.mul_(2)
    stacked, buffers = stack_module_state(norms)
    y = vmap(lambda p, b: functional_call(norms[0], (p, b), (X,)))(stacked, buffers)
    assert_close(y, torch.stack([n(X) for n in norms]))


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_training_inside_a_transform_updates_buffers_that_are_arguments(backend, mode):
    net, plain = make_norm(mode), make_norm(mode)
    parameters = {n: p.detach() for n, p in net.named_parameters()}
    buffers = {n: torch.stack([b] * len(X)) for n, b in net.named_buffers()}

    def loss(parameters, buffers, sample):
        return functional_call(net, (parameters, buffers), (sample[None],)).pow(3).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, buffers, X)
    for i, sample in enumerate(X):
        plain = make_norm(mode)
        plain(sample[None]).pow(3).sum().backward()
        for name, p in plain.named_parameters():
            assert_close(each[name][i], p.grad)
        for name, b in plain.named_buffers():
            assert_close(buffers[name][i], b)


@pytest.mark.parametrize(
    'transform',
    [
        lambda f: grad(lambda x: f(x).sum())(X),
        lambda f: vmap(lambda x: f(x[None]))(X),
        lambda f: jvp(f, (X,), (T,)),
        lambda f: vmap(
            lambda b, x: functional_call(f, dict(f.named_parameters()) | b, (x[None],)), (None, 0)
        )(dict(f.named_buffers()), X),
        lambda f: functionalize(f)(X),
    ],
    ids=['grad', 'vmap', 'jvp', 'vmap with one copy', 'functionalize'],
)
@pytest.mark.parametrize('settings', [dict(), dict(mode='batch')], ids=['estimate', 'batch'])
def test_training_inside_a_transform_is_refused_for_buffers_of_others(transform, settings):
    norm = make_norm(**settings)
    before = copy.deepcopy(norm.state_dict())
    with pytest.raises(RuntimeError, match=r'(?s)in training updates.*call eval.*functional_call'):
        transform(norm)
    assert_close(norm.state_dict(), before)


@pytest.mark.parametrize('momentum', ['cumulative', 1.0])
def test_averages_inside_a_transform_are_refused(momentum):
    norm = make_norm()
    norm.momentum = momentum
    arguments = [
        {n: v.detach().clone() for n, v in values}
        for values in (norm.named_parameters(), norm.named_buffers())
    ]
    with pytest.raises(RuntimeError, match='momentum below 1'):
        grad(lambda p, b: functional_call(norm, (p, b), (X,)).sum())(*arguments)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('way', ['real', 'fake', 'symbolic', 'functionalize'])
def test_a_training_step_as_a_function_of_its_buffers(backend, way, mode):
    """The graphs of `make_fx` have the gradients in them; `functionalize` is a forward pass."""

    def make():
        torch.manual_seed(0)
        return nn.Sequential(WSConv2d(8, 8, 1).double(), make_norm(mode))

    net, plain = make(), make()
    y = plain(X)
    y.pow(3).sum().backward()
    expected = [y, *(p.grad for p in plain.parameters())]
    parameters = dict(net.named_parameters())
    copies = lambda: {name: b.clone() for name, b in net.named_buffers()}  # noqa: E731
    buffers = copies()

    def step(parameters, buffers, x):
        y = functional_call(net, (parameters, buffers), (x,))
        if way == 'functionalize':
            return [y]
        return [y, *torch.autograd.grad(y.pow(3).sum(), list(parameters.values()))]

    try:
        if way == 'functionalize':
            traced, expected = functionalize(step), expected[:1]
        else:
            traced = make_fx(step, tracing_mode=way)(parameters, copies(), X)
    except RuntimeError as error:
        if way != 'symbolic' or 'with symbolic sizes/strides' not in str(error):
            raise
    else:
        assert_close(traced(parameters, buffers, X), expected)
        assert_close(buffers, dict(plain.named_buffers()))


@pytest.mark.parametrize('name', ['WS', 'BCN'])
@pytest.mark.parametrize(
    'backend, transform',
    [(b, t) for b in ('eager', 'kernels') for t in ('grad', 'vmap', 'jvp')],
    indirect=['backend'],
)
def test_transforms_in_compiled_code(backend, transform, name):
    """Exact, or torch's error."""
    torch._dynamo.reset()
    layer = WSConv2d(8, 4, 1).double() if name == 'WS' else make_norm().eval()
    parameters = {n: p.detach() for n, p in layer.named_parameters()}
    run = lambda p, x: functional_call(layer, p, (x,)).pow(3)  # noqa: E731
    function = dict(
        grad=lambda p, x: grad(lambda p: run(p, x).sum())(p),
        vmap=lambda p, x: vmap(lambda x: run(p, x[None]))(x),
        jvp=lambda p, x: jvp(lambda x: run(p, x), (x,), (T,)),
    )[transform]
    try:
        found = torch.compile(function, backend='aot_eager')(parameters, X)
    except RuntimeError:  # torch's
        assert transform != 'grad'
        return
    assert_close(found, function(parameters, X))


@pytest.mark.parametrize('way', ['cond', 'nested_compile_region'])
def test_regions_of_compiled_code_in_evaluation(backend, way):
    """They may not write; torch's own norms can be in them."""
    if way == 'nested_compile_region' and not hasattr(torch.compiler, way):
        pytest.skip('this torch has no such regions')
    torch._dynamo.reset()
    net = nn.Sequential(WSConv2d(8, 8, 1).double(), make_norm()).eval()

    if way == 'cond':
        twice = lambda x: net(x) * 2  # noqa: E731
        run = lambda x: torch.cond(x.sum() > 1e9, twice, net.forward, (x,))  # noqa: E731
        expected = net(X)
    else:
        region = torch.compiler.nested_compile_region(lambda x: net(x))  # noqa: PLW0108
        run, expected = lambda x: region(region(x)), net(net(X))
    y = torch.compile(run, backend='aot_eager', fullgraph=True)(X)
    assert_close(y, expected)
    parameters = list(net.parameters())
    found = torch.autograd.grad(y.pow(3).sum(), parameters)
    assert_close(found, torch.autograd.grad(expected.pow(3).sum(), parameters))


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.skipif(cpu.entries is None, reason='the C++ extension is not compiled')
def test_graphs_of_a_forward_pass_have_gradients(training):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(WSConv2d(8, 8, 1).double(), make_norm(), WSConv2d(8, 4, 1).double())

    found = []
    for net in (make().train(training), make().train(training)):
        parameters = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
        buffers = {name: b.clone() for name, b in net.named_buffers()}
        call = lambda p, b, x: functional_call(net, (p, b), (x,))  # noqa: E731, B023
        if found:
            with torch.set_grad_enabled(not training):  # each has operators of its own
                copies = {name: b.clone() for name, b in buffers.items()}
                call = make_fx(call, tracing_mode='fake')(parameters, copies, X)
        call(parameters, buffers, X).pow(3).sum().backward()
        found.append([*(p.grad for p in parameters.values()), *buffers.values()])
    assert_close(*found)


@pytest.mark.parametrize(
    'backend, scope',
    [('eager', contextlib.nullcontext), ('kernels', once_per_forward)],
    indirect=['backend'],
)
def test_compiled_autograd(backend, scope):
    """The whole backward pass as a graph: of forward passes that knew, and of compiled ones."""
    from torch._dynamo import compiled_autograd

    torch._dynamo.reset()

    def make():
        torch.manual_seed(0)
        return nn.Sequential(WSConv2d(8, 8, 1), make_norm()).double()

    plain, other, compiled = make(), make(), make()
    plain(X).pow(3).sum().backward()
    with scope(other), compiled_autograd._enable(torch.compile(backend='eager')):
        other(X).pow(3).sum().backward()

    @torch.compile(backend='aot_eager')
    def step():
        compiled(X).pow(3).sum().backward()

    with torch._dynamo.config.patch(compiled_autograd=True):
        step()
    for net in (other, compiled):
        assert_close([p.grad for p in net.parameters()], [p.grad for p in plain.parameters()])
        assert_close(list(net.buffers()), list(plain.buffers()))
    torch._dynamo.reset()


class Pyramid(nn.Module):
    """Two levels, and a head that is used on both."""

    def __init__(self, mode):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4, mode=mode))
        self.down = nn.Sequential(WSConv2d(8, 8, 3, 2, 1), BatchChannelNorm2d(8, 4, mode=mode))
        self.head = nn.Sequential(WSConv2d(8, 4, 3), BatchChannelNorm2d(4, 2, mode=mode))
        self.double()

    def forward(self, x):
        x = self.stem(x).relu()
        return [self.head(level) for level in (x, self.down(x))]


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_training_compiled_for_many_sizes(mode):
    """The second size makes a graph for all sizes; tools/dev/compile_sizes.py takes detectors."""
    torch._dynamo.reset()
    plain, other = Pyramid(mode), Pyramid(mode)
    standardize_once_per_forward(plain), standardize_once_per_forward(other)
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(other, fullgraph=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        size = torch.randint(9, 24, (2,), generator=generator).tolist()
        x = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
        for net, run in ((plain, plain), (other, compiled)):
            net.zero_grad()
            sum(level.pow(2).sum() for level in run(x)).backward()
        for p, q in zip(plain.parameters(), other.parameters()):
            assert_close(q.grad, p.grad)
    for p, q in zip(plain.buffers(), other.buffers()):
        assert_close(q, p)
    assert graphs <= 3, graphs
    torch._dynamo.reset()
