"""What torch does with a function besides running it backwards: forward mode, torch.func, sizes."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap

from wsbcn_mm import BatchChannelNorm2d, WSConv2d, backends, reference, weight_standardize
from wsbcn_mm.backends import cpu

needs_cpu_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason=f'{cpu.unavailable()}')


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


@needs_cpu_kernels
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
def test_transforms_of_a_norm_in_evaluation(transform):
    norm = make_norm().eval()
    assert_close(transform(norm), transform(by_reference(norm)))


@needs_cpu_kernels
def test_gradients_of_each_sample_and_ensembles():
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


@needs_cpu_kernels
def test_training_inside_a_transform_does_not_update_silently():
    norm = make_norm()
    before = norm.bn.running_mean.clone()
    with pytest.raises(RuntimeError, match='mutate a captured Tensor|in-place'):
        grad(lambda x: norm(x).sum())(X)
    assert torch.equal(norm.bn.running_mean, before)


def test_other_backends_refuse_transforms():
    """Their nodes are Python's, of which torch says what it lacks."""
    norm = make_norm().eval()
    with backends.use_backend('eager'), pytest.raises(RuntimeError, match='setup_context'):
        grad(lambda x: norm(x).sum())(X)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('backend', ['eager', 'cpu'])
def test_training_compiled_for_many_sizes(backend, mode):
    """The second size makes a graph for all sizes."""
    if backends.BACKENDS[backend].unavailable() is not None:
        pytest.skip(backends.BACKENDS[backend].unavailable())
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain, other = (
        nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4, mode=mode)).double()
        for _ in range(2)
    )
    other.load_state_dict(plain.state_dict())
    graphs = 0

    def count(graph, example_inputs):
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(other, fullgraph=True, backend=count)
    with backends.use_backend(backend):
        for size in ((9, 8), (7, 11), (12, 5), (6, 6), (10, 13)):
            x = torch.randn(2, 3, *size, dtype=torch.float64)
            for net, run in ((plain, plain), (other, compiled)):
                net.zero_grad()
                run(x).pow(2).sum().backward()
            for p, q in zip(plain.parameters(), other.parameters()):
                assert_close(q.grad, p.grad)
    for p, q in zip(plain.buffers(), other.buffers()):
        assert_close(q, p)
    assert graphs <= 3, graphs
    torch._dynamo.reset()
