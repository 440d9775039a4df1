"""`batch_channel_norm` against the specification: values, gradients, running statistics."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.functional.cases import (
    AFFINES,
    LAYOUTS,
    MODES,
    PARAMETERS,
    SHAPES,
    TOLERANCES,
    assert_equal,
    expected_gradients,
    fast,
    gradients,
    make_buffers,
    make_input,
    make_parameters,
    rand,
    spec,
)
from wsbcn_mm import batch_channel_norm, reference

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('affine', AFFINES)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_bcn_equals_reference(mode, training, affine, layout, dtype):
    tested = 0
    for shape, groups in SHAPES:
        x = make_input(shape, layout, dtype)
        one_value_per_channel = x is not None and x.numel() == x.size(1)
        if x is None or (mode == 'batch' and training and one_value_per_channel):
            continue  # no such layout; no such statistics (see test_one_value_per_channel)
        parameters = make_parameters(shape[1], groups, affine, dtype)
        args = groups, *make_buffers(shape[1], dtype)
        settings = dict(training=training, mode=mode, momentum=0.3, eps=1e-3)
        grad_y = make_input(shape, layout, dtype)
        expected = expected_gradients(x, parameters, grad_y, *args, **settings)
        actual = gradients(fast, x, parameters, grad_y, *args, **settings)
        assert all(v.dtype == dtype for v in actual.values())
        assert_equal(actual, expected, TOLERANCES[dtype])
        with torch.no_grad():  # another way through a backend: nothing is kept for a gradient
            values = dict(
                zip(
                    ('y', 'running_mean', 'running_var'),
                    fast(x, *args, parameters, **settings),
                    strict=True,
                )
            )
        assert_equal(values, {name: expected[name] for name in values}, TOLERANCES[dtype])
        tested += 1
    assert tested >= 4


@pytest.mark.parametrize('mode', MODES)
def test_bcn_defaults_are_the_references(mode):
    x, (mean, var) = make_input((2, 8, 3, 3)), make_buffers(8)
    for settings in ({}, dict(training=True)):  # momentum 0.01, eps 1e-5, no affine, estimate
        actual = fast(x, 4, mean, var, {}, **settings)
        expected = spec(x, 4, mean, var, {}, **settings)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@pytest.mark.parametrize('given', PARAMETERS)
def test_every_parameter_may_be_given_alone(given, dtype):
    x, buffers = make_input((2, 8, 3, 5), dtype=dtype), make_buffers(8, dtype)
    parameters = make_parameters(8, 4, dtype=dtype)
    parameters = {k: v if k == given else None for k, v in parameters.items()}
    for mode in MODES:
        settings = dict(training=True, mode=mode)
        args = x, parameters, rand(*x.shape, dtype=dtype), 4, *buffers
        expected = expected_gradients(*args, **settings)
        assert f'grad_{given}' in expected
        assert_equal(gradients(fast, *args, **settings), expected, TOLERANCES[dtype])


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('frozen', [('x',), PARAMETERS, ('batch_weight', 'bias')])
def test_frozen_inputs_get_no_gradient_and_the_others_keep_theirs(mode, frozen, dtype):
    x, buffers = make_input((2, 8, 3, 5), dtype=dtype), make_buffers(8, dtype)
    parameters = make_parameters(8, 4, dtype=dtype)
    grad_y, settings = rand(*x.shape, dtype=dtype), dict(training=True, mode=mode)
    expected = expected_gradients(x, parameters, grad_y, 4, *buffers, **settings)
    values = {'x': x} | parameters
    values = {k: v.clone().requires_grad_(k not in frozen) for k, v in values.items()}
    x = values.pop('x')
    fast(x, 4, *buffers, values, **settings)[0].backward(grad_y)
    for name, value in ({'x': x} | values).items():
        if name in frozen:
            assert value.grad is None
        else:
            gradient = {name: expected[f'grad_{name}']}
            assert_equal({name: value.grad}, gradient, TOLERANCES[dtype])


@pytest.mark.parametrize('given', [('group', 'channel'), ('channel', 'group')])
def test_outer_weight_and_bias_may_differ_in_shape(given, dtype):
    """One per group, the other per channel."""
    sizes = [{'group': 2, 'channel': 6}[kind] for kind in given]
    parameters = make_parameters(6, 2, dtype=dtype)
    parameters.update(weight=rand(sizes[0], dtype=dtype) + 1, bias=rand(sizes[1], dtype=dtype))
    x, grad_y = make_input((2, 6, 4, 3), dtype=dtype), rand(2, 6, 4, 3, dtype=dtype)
    args = x, parameters, grad_y, 2, *make_buffers(6, dtype)
    settings = dict(training=True, momentum=0.3)
    expected = expected_gradients(*args, **settings)
    assert_equal(gradients(fast, *args, **settings), expected, TOLERANCES[dtype])


def test_estimate_mode_normalises_with_the_new_estimates_as_constants():
    x, parameters, (mean, var) = make_input((2, 6, 4, 3)), make_parameters(6, 3), make_buffers(6)
    grad_y, settings = rand(*x.shape), dict(training=True, mode='estimate', momentum=0.4)
    new = reference.update_estimates(x, mean, var, 0.4)

    def normalize(statistics):
        def run(x, groups, mean, var, parameters, **_):
            return reference.normalize(x, *statistics, groups, **parameters), *new

        return gradients(run, x, parameters, grad_y, 3, mean, var)

    actual = gradients(fast, x, parameters, grad_y, 3, mean, var, **settings)
    assert_equal(actual, normalize(new))
    with pytest.raises(AssertionError):  # the old ones are another function
        assert_equal(actual, normalize((mean, var)))


@pytest.mark.parametrize('mode', MODES)
def test_momentum_may_be_a_tensor_of_any_dtype(mode):
    x, (mean, var) = make_input((2, 6, 4)), make_buffers(6)
    expected = fast(x, 3, mean, var, {}, training=True, mode=mode, momentum=0.25)
    for dtype in (torch.float64, torch.float32):
        momentum = torch.tensor(0.25, dtype=dtype)
        actual = fast(x, 3, mean, var, {}, training=True, mode=mode, momentum=momentum)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize('mode', MODES)
def test_momentum_0_keeps_and_momentum_1_replaces_the_buffers(mode):
    x, (mean, var) = make_input((2, 6, 4)), make_buffers(6)
    _, kept_mean, kept_var = fast(x, 3, mean, var, {}, training=True, mode=mode, momentum=0)
    assert torch.equal(kept_mean, mean) and torch.equal(kept_var, var)
    _, new_mean, _ = fast(x, 3, mean, var, {}, training=True, mode=mode, momentum=1)
    torch.testing.assert_close(new_mean, x.mean((0, 2)))


def test_evaluation_leaves_the_buffers_alone():
    for mode in MODES:
        mean, var = make_buffers(6)
        before = mean._version, var._version  # torch counts every in-place write
        batch_channel_norm(make_input((2, 6, 4)), 3, mean, var, mode=mode)
        assert (mean._version, var._version) == before


def test_buffers_are_updated_in_place_and_without_graph():
    mean, var = make_buffers(6)
    before = mean.data_ptr(), var.data_ptr()
    batch_channel_norm(make_input((2, 6, 4)).requires_grad_(), 3, mean, var, training=True)
    assert (mean.data_ptr(), var.data_ptr()) == before
    assert not mean.requires_grad and not var.requires_grad


def test_it_updates_as_often_as_it_runs():
    """Which run activation checkpointing repeats, the layers know."""
    x, buffers = make_input((2, 6, 4)), make_buffers(6)
    twice = [buffer.clone() for buffer in buffers]
    y = checkpoint(
        lambda x: batch_channel_norm(x, 3, *buffers, training=True),
        x.clone().requires_grad_(),
        use_reentrant=False,
    )
    y.sum().backward()
    for _ in range(2):
        batch_channel_norm(x, 3, *twice, training=True)
    torch.testing.assert_close(list(buffers), twice)


# ----------------------------------------------------------------------------------------------
# Shapes at the edge


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shape', [(0, 8, 5, 6), (0, 8), (2, 8, 0, 6), (2, 8, 0)])
def test_empty_input_touches_nothing(shape, mode):
    x, parameters, buffers = torch.zeros(shape), make_parameters(8, 4), make_buffers(8)
    inputs = [v.float().requires_grad_() for v in (x, *parameters.values())]
    mean, var = (b.float() for b in buffers)
    before = mean.clone(), var.clone()
    y = batch_channel_norm(inputs[0], 4, mean, var, *inputs[1:], training=True, mode=mode)
    assert y.shape == shape and y.dtype == x.dtype
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    y.backward(torch.zeros(shape))
    # Zeros, not None: DistributedDataParallel waits for every gradient.
    for value in inputs:
        assert torch.equal(value.grad, torch.zeros_like(value))


@pytest.mark.parametrize('shape', [(1, 8), (1, 8, 1, 1), (1, 8, 1, 1, 1)])
def test_one_value_per_channel(shape, dtype):
    """Image pooling with one image: BatchNorm raises, batch mode falls back on its estimates."""
    (mean, var), parameters = make_buffers(8, dtype), make_parameters(8, 4, dtype=dtype)
    x, grad_y = make_input(shape, dtype=dtype), rand(*shape, dtype=dtype)
    frozen = expected_gradients(x, parameters, grad_y, 4, mean, var)
    batch = gradients(fast, x, parameters, grad_y, 4, mean, var, training=True, mode='batch')
    assert_equal(batch, frozen, TOLERANCES[dtype])
    assert torch.equal(batch['running_mean'], mean) and torch.equal(batch['running_var'], var)
    # Estimate mode needs no second value: around the old mean there is a second moment.
    settings = dict(training=True, mode='estimate', momentum=0.3)
    estimate = gradients(fast, x, parameters, grad_y, 4, mean, var, **settings)
    expected = expected_gradients(x, parameters, grad_y, 4, mean, var, **settings)
    assert_equal(estimate, expected, TOLERANCES[dtype])
    assert not torch.equal(estimate['running_mean'], mean)


@pytest.mark.parametrize('mode', MODES)
def test_constant_input_is_finite(mode):
    for dtype in (torch.float16, torch.float32):
        x, parameters = torch.full((2, 8, 3, 3), 5.0, dtype=dtype), make_parameters(8, 4)
        parameters = {k: v.to(dtype) for k, v in parameters.items()}
        buffers = make_buffers(8, dtype)
        grad_y = rand(*x.shape, dtype=dtype)
        found = gradients(fast, x, parameters, grad_y, 4, *buffers, training=True, mode=mode)
        assert all(v.isfinite().all() for v in found.values())
