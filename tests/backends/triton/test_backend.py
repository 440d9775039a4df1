"""Triton as a backend: when it is taken, and what is registered with torch."""

import pytest
import torch

from tests.backends.triton.cases import (
    DEVICE,
    DTYPES,
    launch,
    make_affine,
    make_input,
    make_running,
    rand,
    run,
)
from wsbcn_mm.backends import dispatched
from wsbcn_mm.backends import triton as backend


def test_reasons(monkeypatch):
    x = torch.zeros(2, 3)
    monkeypatch.setattr(backend, 'INTERPRETED', False)
    assert 'cannot take a tensor on cpu' in backend.supports(x)
    if torch.version.cuda is None and torch.version.hip is None:
        assert backend.unavailable() == 'torch is installed without CUDA'
    monkeypatch.setattr(backend, 'INTERPRETED', True)
    assert backend.unavailable() is None
    assert [backend.supports(x.to(dtype)) for dtype in DTYPES] == [None] * 4
    assert 'cannot take torch.int64' in backend.supports(x.long())
    assert 'cannot take an empty tensor' in backend.supports(x[:0])
    monkeypatch.setattr(backend, 'find_spec', lambda name: None)
    assert backend.unavailable() == 'triton is not installed'


def test_the_interpreter_is_called_directly(monkeypatch):
    monkeypatch.setattr(backend, 'INTERPRETED', True)
    assert backend.kernels() is launch
    monkeypatch.setattr(backend, 'INTERPRETED', False)
    assert backend.kernels() is dispatched


def test_operators_are_registered_for_cuda():
    backend.register()
    backend.register()  # torch does not allow a second registration
    for name in backend.OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f'wsbcn_mm::{name}', 'CUDA')


@pytest.mark.parametrize(
    'wanted, error, words',
    [
        ('cpp', RuntimeError, 'WSBCN_LAUNCHER=cpp needs the compiled extension'),
        ('C++', ValueError, r"(?s)WSBCN_LAUNCHER must be cpp or python.*got 'C\+\+'"),
    ],
)
def test_a_launcher_that_cannot_be_had_is_not_replaced(wanted, error, words, monkeypatch):
    monkeypatch.setattr(backend, 'INTERPRETED', True)  # where the driver is never asked
    monkeypatch.setattr(backend, '_library', 'registered')  # on a GPU the launcher in C++ stays
    monkeypatch.setenv('WSBCN_LAUNCHER', 'python')
    assert backend.register() is False
    monkeypatch.setenv('WSBCN_LAUNCHER', wanted)
    with pytest.raises(error, match=words):
        backend.register()


def test_operators_pass_their_arguments_on():
    """What is registered for CUDA, under another name and for the device of the tests."""
    library = torch.library.Library('wsbcn_mm_test', 'DEF')
    for name in backend.OPERATORS:
        schema = str(getattr(torch.ops.wsbcn_mm, name).default._schema)
        library.define(schema.removeprefix('wsbcn_mm::'))
        library.impl(name, backend.launcher(name), DEVICE.upper())
    ops = torch.ops.wsbcn_mm_test

    x, grad, affine = make_input((2, 6, 9)), rand(2, 6, 9), make_affine(6, 3)
    running, rate = make_running(6), torch.tensor(0.4, device=DEVICE)
    expected = run(x, 3, running, affine, grad, 'estimate', rate)
    in_batch = run(x, 3, running, affine, grad, 'batch', 0.3)
    y, *statistics = ops.normalize_with_estimates(x, 3, *running, *affine, None, rate, 1e-3)
    assert torch.equal(y, expected['y'])
    assert torch.equal(running.mean, expected['running_mean'])
    assert torch.equal(running.var, expected['running_var'])
    assert torch.equal(ops.evaluate(x, 3, *running, *affine, 1e-3), y)
    assert torch.equal(ops.normalize(x, 3, *statistics[:4], *affine, 1e-3)[0], y)
    gradients = ops.normalize_backward(grad, x, 3, *statistics, *affine, 1e-3, False)
    for name, result in zip(('x', *affine._fields), gradients):
        assert torch.equal(result, expected[f'grad_{name}']), name
    batch = ops.normalize_with_batch(x, 3, *make_running(6), *affine, 0.3, None, 1e-3)
    assert torch.equal(batch[0], in_batch['y'])
    for result, direct in zip(ops.row_moments(x), launch.row_moments(x)):
        assert torch.equal(result, direct)

    w_hat, mean, sigma = ops.standardize(x, 1e-5, 'var_eps', torch.float16)
    assert torch.equal(w_hat, launch.standardize(x, 1e-5, 'var_eps', torch.float16)[0])
    gradient = ops.standardize_backward(grad, x, mean, sigma, 1e-5, 'var_eps')
    assert torch.equal(gradient, launch.standardize_backward(grad, x, mean, sigma, 1e-5, 'var_eps'))


def test_an_old_triton_is_refused():
    from wsbcn_mm.backends.triton import jit

    with pytest.raises(ImportError, match='need Triton >= 3.2\n  got 3.1.0; '):
        jit.check_triton('3.1.0')
    jit.check_triton('3.2.0')
