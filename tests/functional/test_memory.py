"""Memory formats, views, and what `batch_channel_norm` keeps for the backward pass."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from tests.functional.cases import (
    MODES,
    assert_equal,
    clone,
    fast,
    gradients,
    make_buffers,
    make_input,
    make_parameters,
    rand,
    spec,
)
from wsbcn_mm import batch_channel_norm

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend


@pytest.mark.parametrize(
    'shape, memory_format',
    [
        ((2, 8, 5, 6), torch.contiguous_format),
        ((2, 8, 5, 6), torch.channels_last),
        ((2, 8, 3, 5, 6), torch.contiguous_format),
        ((2, 8, 3, 5, 6), torch.channels_last_3d),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', MODES)
def test_memory_format_is_kept(mode, dtype, shape, memory_format):
    x = make_input(shape, dtype=dtype).contiguous(memory_format=memory_format)
    parameters, buffers = make_parameters(8, 4, dtype=torch.float32), make_buffers(8, torch.float32)
    grad_y = rand(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    found = gradients(fast, x, parameters, grad_y, 4, *buffers, training=True, mode=mode)
    for name in ('y', 'grad_x'):
        assert found[name].stride() == x.stride(), name


RANKS = [(4, 8), (2, 8, 5), (2, 8, 5, 6), (2, 8, 3, 5, 2)]


@pytest.mark.parametrize('shape', RANKS)
@pytest.mark.parametrize('mode', MODES)
def test_in_place_relu_may_follow(shape, mode):
    def relu_after(run):
        def run_relu(*args, **settings):
            y, mean, var = run(*args, **settings)
            return F.relu_(y), mean, var

        return run_relu

    x, parameters, buffers = make_input(shape), make_parameters(8, 4), make_buffers(8)
    args, settings = (4, *buffers), dict(training=True, mode=mode)
    grad_y = rand(*shape)
    actual = gradients(relu_after(fast), x, parameters, grad_y, *args, **settings)
    assert_equal(actual, gradients(relu_after(spec), x, parameters, grad_y, *args, **settings))


@pytest.mark.parametrize('use_reentrant', [True, False])
@pytest.mark.parametrize('shape', RANKS)
def test_result_is_not_a_view_and_may_be_checkpointed(shape, use_reentrant):
    """Reentrant checkpointing rejects an in-place operation on a view of a custom Function."""
    x, parameters, (mean, var) = make_input(shape), make_parameters(8, 4), make_buffers(8)
    x.requires_grad_()

    def run(x):
        y = batch_channel_norm(x, 4, mean.clone(), var.clone(), **parameters, training=True)
        assert not y._is_view() and y.data_ptr() != x.data_ptr()
        return F.relu_(y)

    grad_y = rand(*shape)
    (expected,) = torch.autograd.grad(run(x), x, grad_y)
    checkpoint(run, x, use_reentrant=use_reentrant).backward(grad_y)
    assert torch.equal(x.grad, expected)


def saved_bytes(run, x):
    """Bytes that autograd keeps for the backward pass, every storage once."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # kept alive: its address cannot be given again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(x)
    assert y.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize('mode', MODES)
def test_bcn_and_in_place_relu_save_twice_the_input(mode):
    """x for BCN and its output for ReLU; everything else is (N, C). Not the result of stage 1."""
    x = make_input((2, 32, 40, 40), dtype=torch.float32).requires_grad_()
    parameters = {k: v.requires_grad_() for k, v in make_parameters(32, 8, dtype=x.dtype).items()}
    args = 8, *make_buffers(32, x.dtype), parameters
    settings = dict(training=True, mode=mode)
    ours = saved_bytes(lambda x: F.relu_(fast(x, *args, **settings)[0]), x)
    naive = saved_bytes(lambda x: F.relu_(spec(x, *args, **settings)[0]), x)
    assert ours <= 2.1 * x.nbytes
    assert naive > 3 * x.nbytes


@pytest.mark.parametrize('mode', MODES)
def test_buffers_may_change_before_the_backward_pass(mode):
    """Shared layers (a detection head over five levels) update them again before any backward."""
    first, second = make_input((2, 6, 4, 3)), 5 * make_input((3, 6, 2, 2))
    grads = rand(*first.shape), rand(*second.shape)
    buffers, settings = make_buffers(6), dict(training=True, mode=mode, momentum=0.5)

    def run(step):
        parameters = {k: v.requires_grad_() for k, v in clone(given).items()}
        xs = [x.clone().requires_grad_() for x in (first, second)]
        outputs, (mean, var) = [], (b.clone() for b in buffers)
        for x in xs:
            y, mean, var = step(x, 3, mean, var, parameters, **settings)
            outputs.append(y)
        torch.autograd.backward(outputs, grads)
        return {'0': xs[0].grad, '1': xs[1].grad} | {k: v.grad for k, v in parameters.items()}

    def in_place(x, groups, mean, var, parameters, **settings):
        return batch_channel_norm(x, groups, mean, var, **parameters, **settings), mean, var

    given = make_parameters(6, 3)
    assert_equal(run(in_place), run(spec))


def test_overwritten_buffers_do_not_reach_the_backward_pass():
    x, (mean, var) = make_input((2, 6, 4)).requires_grad_(), make_buffers(6)
    grad_y = rand(*x.shape)
    for training in (True, False):
        (expected,) = torch.autograd.grad(
            batch_channel_norm(x, 3, mean.clone(), var.clone(), training=training), x, grad_y
        )
        buffers = mean.clone(), var.clone()
        y = batch_channel_norm(x, 3, *buffers, training=training)
        for buffer in buffers:
            buffer.fill_(torch.nan)
        assert torch.equal(torch.autograd.grad(y, x, grad_y)[0], expected)


def test_statistics_that_require_a_gradient_are_refused():
    """They have none: torch's BatchNorm refuses them too."""
    x = make_input((2, 6, 4))
    for mode, training in itertools.product(MODES, (True, False)):
        for name in range(2):
            buffers = make_buffers(6)
            before = clone(dict(enumerate(buffers)))
            buffers[name].requires_grad_()
            with pytest.raises(ValueError, match='must not require a gradient'):
                batch_channel_norm(x, 3, *buffers, training=training, mode=mode)
            assert all(torch.equal(buffers[i], before[i]) for i in range(2))
            with torch.no_grad():
                batch_channel_norm(x, 3, *buffers, training=training, mode=mode)
