"""Numeric gradients and second derivatives of `batch_channel_norm`."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.functional.cases import (
    AFFINES,
    MODES,
    assert_equal,
    fast,
    make_buffers,
    make_input,
    make_parameters,
    rand,
    spec,
)
from wsbcn_mm import batch_channel_norm

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend


@pytest.mark.parametrize('affine', AFFINES)
@pytest.mark.parametrize('training, mode', [(True, 'batch'), (True, 'estimate'), (False, 'batch')])
@pytest.mark.parametrize('check', [gradcheck, gradgradcheck])
def test_bcn_numeric_gradients(check, training, mode, affine):
    # In estimate mode the statistics move with x, but are constants for the gradient: only with
    # momentum 0 is the numeric derivative the same thing.
    x, (mean, var) = make_input((2, 4, 3)), make_buffers(4)
    parameters = {k: v for k, v in make_parameters(4, 2, affine).items() if v is not None}

    def run(x, *values):
        return batch_channel_norm(
            x,
            2,
            mean.clone(),
            var.clone(),
            **dict(zip(parameters, values, strict=True)),
            training=training,
            mode=mode,
            momentum=0.0,
            eps=1e-3,
        )

    inputs = [v.requires_grad_() for v in (x, *parameters.values())]
    assert check(run, inputs)


def second_derivatives(run, x, parameters, *args, **settings):
    """Of a gradient penalty: <u, grad_x> + <v, grad_batch_weight>, by everything and by grad_y."""
    torch.manual_seed(1)
    wanted = [v.detach().requires_grad_() for v in (x, *parameters.values())]
    grad_y = rand(*x.shape).requires_grad_()
    y, *_ = run(wanted[0], *args, dict(zip(parameters, wanted[1:], strict=True)), **settings)
    first = torch.autograd.grad(y, wanted, grad_y, create_graph=True)
    second = torch.autograd.grad(
        first[:3], [*wanted[:4], grad_y], [rand(*g.shape) for g in first[:3]]
    )
    return {str(i): g.detach() for i, g in enumerate([*first, *second])}


@pytest.mark.parametrize('training, mode', [(True, 'batch'), (True, 'estimate'), (False, 'batch')])
@pytest.mark.parametrize('shape', [(2, 6, 4, 3), (4, 6)])
def test_bcn_double_backward_equals_reference(shape, training, mode):
    args = make_input(shape), make_parameters(6, 3), 3, *make_buffers(6)
    settings = dict(training=training, mode=mode, momentum=0.3)
    expected = second_derivatives(spec, *args, **settings)
    assert_equal(second_derivatives(fast, *args, **settings), expected, 1e-9)


@pytest.mark.parametrize('mode', MODES)
def test_bcn_double_backward_where_the_input_depends_on_the_parameters(mode):
    """A layer used twice: the way through x must not be counted as the parameter's own."""

    def twice(run):
        def run_twice(x, groups, mean, var, parameters, **settings):
            y, mean, var = run(x, groups, mean, var, parameters, **settings)
            return run(y.tanh(), groups, mean, var, parameters, **settings)

        return run_twice

    args = make_input((2, 6, 4)), make_parameters(6, 3), 3, *make_buffers(6)
    settings = dict(training=True, mode=mode, momentum=0.3)
    expected = second_derivatives(twice(spec), *args, **settings)
    assert_equal(second_derivatives(twice(fast), *args, **settings), expected, 1e-9)
