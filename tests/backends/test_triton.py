"""The Triton kernels against the specification, `wsbcn_mm.reference`, in float64.

On a GPU they are compiled; without one Triton's interpreter runs them, on CPU tensors, and
`test_kernels_compile` shows that they can be compiled too. Inputs and statistics are off-centre,
cotangents random. Most tests cut x twice: as a GPU would want it, where one tile covers a row of a
small x, and into tiles of a few values, so that every loop has several turns and every row several
chunks.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from wsbcn_mm import reference
from wsbcn_mm.backends import dispatched
from wsbcn_mm.backends import triton as backend
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.backends.ops import accumulation_dtype

if find_spec('triton') is None:
    pytest.skip('triton is not installed', allow_module_level=True)

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def import_launch():
    """`launch`, and with it Triton, which decides at its import whether it interprets."""
    with pytest.MonkeyPatch.context() as patch:  # processes that other tests start must not see it
        if DEVICE == 'cpu':
            patch.setenv('TRITON_INTERPRET', '1')
        from triton import JITFunction, language

        if DEVICE == 'cpu' and isinstance(language.sum, JITFunction):
            reason = 'triton was imported before it could be told to interpret: run this file alone'
            pytest.skip(reason, allow_module_level=True)
        from wsbcn_mm.backends.triton import launch
    return launch


launch = import_launch()

FORMULAS = ('paper', 'std_eps', 'var_eps')
MODES = ('estimate', 'evaluate', 'batch')
PARAMETERS = ('batch_weight', 'batch_bias', 'weight', 'bias')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest value of a tensor. Half precision rounds y and dx, nothing else.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# (shape, num_groups): 1d to 3d, odd sizes, one sample, one position, no axis of positions at all;
# one group (LayerNorm as the second stage), a group per channel (InstanceNorm).
SHAPES = [
    ((2, 6, 5, 7), 3),
    ((1, 8, 12, 4), 2),
    ((1, 20, 4, 3), 1),
    ((3, 5, 7), 5),
    ((2, 6, 3, 4, 3), 2),
    ((3, 8, 1, 1), 4),
    ((5, 12), 3),
]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = ('contiguous', 'channels_last')
CASES = [
    (shape, groups, layout)
    for shape, groups in SHAPES
    for layout in LAYOUTS
    if layout == 'contiguous' or len(shape) in LAST
]
CUTS = {'as a GPU wants it': {}, 'small': dict(TILE=16, REDUCING=24, APPLYING=32)}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    torch.manual_seed(0)
    if DEVICE == 'cpu':
        monkeypatch.setenv('TRITON_INTERPRET', '1')


@pytest.fixture(params=CUTS)
def cut(request, monkeypatch):
    for name, value in CUTS[request.param].items():
        monkeypatch.setattr(launch, name, value)
    return request.param


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def in_layout(x, layout):
    return x if layout == 'contiguous' else x.contiguous(memory_format=LAST[x.dim()])


def make_input(shape, layout='contiguous', dtype=torch.float64):
    """An off-centre input whose channels differ."""
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = rand(*shape) * rand(*channel).exp() + 3 * rand(*channel) + 1
    return in_layout(x.to(dtype), layout)


def make_parameters(channels, outer, dtype=torch.float64):
    """`outer`: size of the outer affine, 0 for none."""
    return dict(
        batch_weight=rand(channels, dtype=dtype) + 1,
        batch_bias=rand(channels, dtype=dtype),
        weight=rand(outer, dtype=dtype) + 1 if outer else None,
        bias=rand(outer, dtype=dtype) if outer else None,
    )


def make_buffers(channels, dtype=torch.float64):
    return 1 + rand(channels, dtype=dtype), rand(channels).exp().to(dtype)


def double(value):
    return None if value is None else value.detach().double()


def run(x, groups, buffers, parameters, grad, mode, rate=0.3, eps=1e-3):
    """Every operator of Batch-Channel Normalization: all results by name, and the buffers."""
    running, affine = Running(*(b.clone() for b in buffers)), Affine(**parameters)
    if mode == 'batch':
        y, statistics = launch.normalize_with_batch(x, groups, running, affine, rate, eps)
    else:
        used_rate = rate if mode == 'estimate' else None
        y, statistics = launch.normalize_with_estimates(x, groups, running, affine, used_rate, eps)
    grad_x, gradients = launch.normalize_backward(
        grad, x, groups, statistics, affine, eps, mode == 'batch'
    )
    m, q, mean, var, *group = statistics
    running_mean, running_var, _ = running
    gradients = [grad_x, *gradients]
    names = ('group_mean', 'inv_group_std', 'grad_x', *(f'grad_{name}' for name in PARAMETERS))
    return dict(
        y=y,
        m=m,
        q=q,
        mean=mean,
        var=var,
        running_mean=running_mean,
        running_var=running_var,
        **dict(zip(names, [*group, *gradients])),
    )


def spec(x, groups, buffers, parameters, grad, mode, rate=0.3, eps=1e-3):
    """The same in float64, from the specification."""
    x, grad = double(x).requires_grad_(), double(grad)
    parameters = {k: double(v) for k, v in parameters.items()}
    wanted = {'x': x} | {k: v.requires_grad_() for k, v in parameters.items() if v is not None}
    running = mean, var = [double(b) for b in buffers]
    if mode == 'estimate':
        running = mean, var = reference.update_estimates(x, mean, var, rate)
    elif mode == 'batch':
        _, *running = reference.batch_channel_norm(
            x, groups, mean, var, training=True, mode='batch', momentum=rate
        )
        mean, var = reference.batch_statistics(x)
    y = reference.normalize(x, mean, var, groups, **parameters, eps=eps)
    found = torch.autograd.grad(y, list(wanted.values()), grad)

    rows = x.detach().reshape(*x.shape[:2], -1)
    x1 = (rows - mean[:, None]) / (var[:, None] + eps).sqrt()
    if parameters['batch_weight'] is not None:
        x1 = x1 * parameters['batch_weight'][:, None]
    if parameters['batch_bias'] is not None:
        x1 = x1 + parameters['batch_bias'][:, None]
    x1 = x1.reshape(x.size(0), groups, -1)
    results = dict(
        y=y,
        m=rows.mean(2),
        q=rows.var(2, unbiased=False),
        mean=mean,
        var=var,
        running_mean=running[0],
        running_var=running[1],
        group_mean=x1.mean(2),
        inv_group_std=(x1.var(2, unbiased=False) + eps).rsqrt(),
        **{f'grad_{name}': g for name, g in zip(wanted, found)},
    )
    return {name: value.detach() for name, value in results.items()}


def assert_close(actual, expected, dtype, name):
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).abs().max()
    scale = expected.abs().max().clamp(min=1)
    assert error <= TOLERANCE[dtype] * scale, f'{name}: {error:.1e} at scale {scale:.1e}'


def check(x, groups, buffers, parameters, grad, mode, **settings):
    """Everything that `run` returns has the value of `spec`, its dtype and its layout."""
    actual = run(x, groups, buffers, parameters, grad, mode, **settings)
    expected = spec(x, groups, buffers, parameters, grad, mode, **settings)
    for name, value in expected.items():
        if name in ('y', 'grad_x'):
            dtype = x.dtype
            assert actual[name].stride() == x.stride(), name
        elif name.startswith('running'):
            dtype = buffers[0].dtype
        else:
            dtype = accumulation_dtype(x.dtype)
        assert actual[name].dtype == dtype, name
        # Coarser buffers round what goes into them and what comes out.
        coarse = torch.float32 if x.dtype != torch.float64 else torch.float64
        assert_close(actual[name], value, dtype if dtype == x.dtype else coarse, name)


# ----------------------------------------------------------------------------------------------
# Batch-Channel Normalization equals the specification


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shape, groups, layout', CASES)
def test_bcn_equals_reference(shape, groups, layout, mode, cut):
    x, grad = make_input(shape, layout), make_input(shape, layout)
    check(x, groups, make_buffers(shape[1]), make_parameters(shape[1], groups), grad, mode)


@pytest.mark.parametrize('dtype', DTYPES[1:])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('mode', MODES)
def test_bcn_in_every_dtype(mode, layout, dtype):
    shape, groups = (2, 8, 13, 16), 4
    x, grad = make_input(shape, layout, dtype), make_input(shape, layout, dtype)
    parameters = make_parameters(8, groups, dtype)
    check(x, groups, make_buffers(8, dtype), parameters, grad, mode)


@pytest.mark.parametrize('outer', [0, 3, 12])
@pytest.mark.parametrize('mode', MODES)
def test_outer_affine_per_group_per_channel_or_none(mode, outer, cut):
    x, grad = make_input((3, 12, 5)), rand(3, 12, 5)
    check(x, 3, make_buffers(12), make_parameters(12, outer), grad, mode)


@pytest.mark.parametrize('given', PARAMETERS)
def test_every_parameter_may_be_given_alone(given):
    x, grad, buffers = make_input((2, 8, 3, 5)), rand(2, 8, 3, 5), make_buffers(8)
    parameters = {k: v if k == given else None for k, v in make_parameters(8, 4).items()}
    for mode in ('estimate', 'batch'):
        check(x, 4, buffers, parameters, grad, mode)


def test_weight_and_bias_may_differ_in_size_going_forward():
    x, buffers = make_input((2, 8, 15)), make_buffers(8)
    affine = Affine(**(make_parameters(8, 4) | dict(bias=rand(8))))
    y = launch.evaluate(x, 4, Running(*buffers), affine, 1e-5)
    assert_close(y, reference.normalize(x, *buffers, 4, *affine), x.dtype, 'y')


def test_parameters_and_buffers_may_be_strided():
    x, grad = make_input((2, 6, 9)), rand(2, 6, 9)
    parameters = {k: torch.stack([v, v], 1)[:, 1] for k, v in make_parameters(6, 3).items()}
    pairs = [torch.stack([b, b], 1) for b in make_buffers(6)]
    buffers = [pair[:, 0] for pair in pairs]
    assert not any(t.is_contiguous() for t in (*parameters.values(), *buffers))
    check(x, 3, buffers, parameters, grad, 'estimate')

    expected = spec(x, 3, buffers, parameters, grad, 'estimate')
    beside = [pair[:, 1].clone() for pair in pairs]
    affine = Affine(**parameters)
    launch.normalize_with_estimates(x, 3, Running(*buffers), affine, 0.3, 1e-3)
    assert_close(buffers[0], expected['running_mean'], x.dtype, 'running_mean')
    assert_close(buffers[1], expected['running_var'], x.dtype, 'running_var')
    assert all(torch.equal(pair[:, 1], before) for pair, before in zip(pairs, beside))


@pytest.mark.parametrize('dtype', DTYPES)
def test_update_in_every_dtype_of_the_buffers(dtype):
    x, grad = (make_input((2, 6, 9), dtype=torch.float32) for _ in range(2))
    args = x, 3, make_buffers(6, dtype), make_parameters(6, 3), grad, 'estimate'
    actual, expected = run(*args), spec(*args)
    for name in ('mean', 'var'):
        # x is normalised with what has not been rounded to the buffers.
        assert_close(actual[name], expected[name], torch.float32, name)
        assert actual[f'running_{name}'].dtype == dtype
        assert_close(actual[f'running_{name}'], double(actual[name]), dtype, name)


def test_rate_may_be_a_tensor_of_any_dtype():
    x, grad, buffers = make_input((2, 6, 9)), rand(2, 6, 9), make_buffers(6)
    args = x, 3, buffers, make_parameters(6, 3), grad, 'estimate'
    expected = run(*args, rate=0.25)
    for dtype in DTYPES:
        rate = torch.tensor(0.25, dtype=dtype, device=DEVICE)
        actual = run(*args, rate=rate)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_momentum_0_keeps_and_momentum_1_replaces_the_buffers(cut):
    x, grad, (mean, var) = make_input((2, 6, 9)), rand(2, 6, 9), make_buffers(6)
    args = x, 3, (mean, var), make_parameters(6, 3), grad, 'estimate'
    kept = run(*args, rate=0.0)
    assert torch.equal(kept['running_mean'], mean) and torch.equal(kept['running_var'], var)
    new = run(*args, rate=1.0)
    assert_close(new['running_mean'], x.mean((0, 2)), x.dtype, 'running_mean')
    second = (x - mean[:, None]).square().mean((0, 2))
    assert_close(new['running_var'], second, x.dtype, 'running_var')


@pytest.mark.parametrize('dtype', DTYPES)
def test_without_update_the_buffers_are_left_alone(dtype):
    x, grad = make_input((5, 6, 9), dtype=dtype), rand(5, 6, 9, dtype=dtype)
    args = x, 3, make_buffers(6), make_parameters(6, 3), grad, 'evaluate'
    actual = run(*args)
    for name, before in zip(('mean', 'var'), args[2]):
        assert torch.equal(actual[f'running_{name}'], before)
        assert torch.equal(actual[name], before.to(accumulation_dtype(dtype)))


# ----------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize('layout', LAYOUTS)
def test_moments_far_from_zero(layout, cut):
    """In float32, mean 1000 and standard deviation 1: E[x^2] - E[x]^2 errs by some per cent."""
    x = in_layout((1000 + rand(1, 4, 5, 7)).float(), layout)
    mean, variance = x.double().mean((2, 3)), x.double().var((2, 3), unbiased=False)
    naive = x.square().mean((2, 3)) - x.mean((2, 3)).square()
    assert ((naive - variance) / variance).abs().max() > 1e-2
    m, q = launch.row_moments(x)
    assert ((q - variance) / variance).abs().max() < 3e-5
    assert (m - mean).abs().max() <= 2**-14  # one step of float32 there


@pytest.mark.parametrize('mode', MODES)
def test_bcn_far_from_zero(mode, cut):
    x, grad = (1000 + rand(1, 4, 5, 7)).float(), rand(1, 4, 5, 7, dtype=torch.float32)
    buffers = torch.full((4,), 999.0, device=DEVICE), torch.full((4,), 0.5, device=DEVICE)
    args = x, 2, buffers, make_parameters(4, 2), grad, mode
    actual, expected = run(*args), spec(*args)
    for name in ('y', 'grad_x'):  # the means are rounded, to 2^-14
        error = (actual[name].double() - expected[name]).abs().max()
        assert error < 5e-4, f'{name}: {error:.1e}'


@pytest.mark.parametrize('value', [0.0, 0.1, -1000.3, 1e6])
def test_constant_rows_have_no_variance(value, cut):
    x = torch.full((2, 4, 37), value, device=DEVICE)
    m, q = launch.row_moments(x)
    assert (m == x[:, :, 0]).all() and (q == 0).all()


# ----------------------------------------------------------------------------------------------
# Weight Standardization equals the specification


def check_weight(weight, grad, formula, dtype, eps=1e-3):
    w_hat, mean, sigma = launch.standardize(weight, eps, formula, dtype)
    found = launch.standardize_backward(grad, weight, mean, sigma, eps, formula)
    exact = double(weight).requires_grad_()
    expected = reference.weight_standardize(exact, eps, formula)
    (expected_grad,) = torch.autograd.grad(expected, exact, double(grad))

    accumulated = accumulation_dtype(weight.dtype)
    assert w_hat.dtype == dtype and w_hat.stride() == weight.stride()
    assert found.dtype == weight.dtype and found.stride() == weight.stride()
    assert mean.dtype == sigma.dtype == accumulated
    rows = exact.detach().flatten(1)
    variance = rows.var(1, unbiased=formula != 'paper')
    deviation = variance.sqrt() if formula == 'std_eps' else (variance + eps).sqrt()
    assert_close(mean, rows.mean(1), accumulated, 'mean')
    assert_close(sigma, deviation, accumulated, 'sigma')
    assert_close(w_hat, expected.detach(), max(dtype, accumulated, key=TOLERANCE.get), 'w_hat')
    assert_close(found, expected_grad, weight.dtype, 'grad')


@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(5, 3, 3, 3), (4, 2, 1, 1), (1, 16, 3, 1), (3, 4, 2, 1, 3)])
def test_ws_equals_reference(shape, layout, formula, cut):
    check_weight(make_input(shape, layout), make_input(shape, layout), formula, torch.float64)


@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('shape', [(5, 12), (4, 3, 7), (2, 5000)])
def test_ws_of_linear_1d_and_wide_weights(shape, formula):
    check_weight(make_input(shape), rand(*shape), formula, torch.float64)


@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('result', DTYPES[1:])
@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_ws_in_every_dtype(dtype, result, formula):
    """The result, and with it the gradient that comes back, may have another dtype."""
    weight, grad = make_input((4, 3, 3, 3), dtype=dtype), make_input((4, 3, 3, 3), dtype=result)
    check_weight(weight, grad, formula, result)


@pytest.mark.filterwarnings('ignore:divide by zero')  # of the interpreter; the result is not used
@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_of_a_constant_row(formula, cut):
    """It has no deviation, and that has no gradient: only the one through the mean is left."""
    weight, grad = torch.full((2, 27), 0.1, device=DEVICE), rand(2, 27, dtype=torch.float32)
    w_hat, mean, sigma = launch.standardize(weight, 1e-4, formula, torch.float32)
    denominator = sigma + 1e-4 if formula == 'std_eps' else sigma
    assert (w_hat == 0).all()
    exact = torch.full((2,), 1e-4 if formula == 'std_eps' else 1e-2, device=DEVICE)
    assert torch.allclose(denominator, exact)
    found = launch.standardize_backward(grad, weight, mean, sigma, 1e-4, formula)
    centred = double(grad) - double(grad).mean(1, keepdim=True)
    assert_close(found, centred / denominator[:, None], torch.float32, 'grad')


# ----------------------------------------------------------------------------------------------
# Memory


@pytest.fixture
def guarded(monkeypatch):
    """Every new tensor is NaN, and so is the memory around it, before the kernels and after."""
    guards, margin = [], 64
    empty, empty_like = torch.empty, torch.empty_like

    def guarded_empty(shape, dtype, device):
        numel = torch.Size(shape).numel()
        memory = empty(numel + 2 * margin, dtype=dtype, device=device).fill_(torch.nan)
        guards.extend((memory[:margin], memory[margin + numel :]))
        return memory[margin : margin + numel].view(shape)

    def guarded_empty_like(x, dtype=None):
        flat = guarded_empty((x.numel(),), dtype or x.dtype, x.device)
        return flat.as_strided(x.shape, empty_like(x).stride(), flat.storage_offset())

    monkeypatch.setattr(torch, 'empty', guarded_empty)
    monkeypatch.setattr(torch, 'empty_like', guarded_empty_like)
    yield
    monkeypatch.undo()
    assert len(guards) >= 8
    assert all(guard.isnan().all() for guard in guards)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
@pytest.mark.parametrize('shape, groups, layout', CASES[:2])
def test_everything_is_written_and_nothing_around_it(shape, groups, layout, mode, cut, guarded):
    x, grad = (make_input(shape, layout, torch.float32) for _ in range(2))
    parameters = make_parameters(shape[1], groups)
    inputs = x, grad, *parameters.values()
    before = [value.clone() for value in inputs]
    check(x, groups, make_buffers(shape[1], torch.float32), parameters, grad, mode)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before))


@pytest.mark.parametrize('formula', FORMULAS)
def test_all_of_a_weight_is_written_and_nothing_around_it(formula, cut, guarded):
    for shape in ((5, 3, 3, 3), (3, 50)):
        check_weight(make_input(shape), make_input(shape), formula, torch.float64)


@pytest.mark.parametrize('mode', MODES)
def test_results_are_the_same_bit_for_bit_in_every_run(mode, cut):
    x, grad = (make_input((1, 4, 5, 7), dtype=torch.float32) for _ in range(2))
    args = x, 2, make_buffers(4), make_parameters(4, 2), grad, mode
    first, second = run(*args), run(*args)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_layouts_are_refused():
    x = rand(2, 6, 4, 5)
    with pytest.raises(ValueError, match=r'contiguous or channels_last tensor\n  got shape'):
        launch.row_moments(x.transpose(2, 3))


def test_gradients_come_in_any_layout():
    x, grad = make_input((2, 6, 4, 5)), make_input((2, 6, 4, 5))
    last = in_layout(grad, 'channels_last')
    args = x, 3, make_buffers(6), make_parameters(6, 3)
    expected, actual = (run(*args, g, 'estimate') for g in (grad, last))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    mean, sigma = rand(2), rand(2).exp()
    expected, actual = (
        launch.standardize_backward(g, x, mean, sigma, 1e-5, 'paper') for g in (grad, last)
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize('contiguous', [True, False])
@pytest.mark.parametrize('shape', [(1, 64, 200, 304), (2, 2048, 7, 7), (4, 256), (1, 1, 10**10)])
def test_x_is_cut_completely_and_into_enough_programs(shape, contiguous):
    samples, channels, *positions = shape
    length = torch.Size(positions).numel()
    for programs in (launch.REDUCING, launch.APPLYING):
        cut = launch._cut_shape(torch.Size(shape), contiguous, 2, programs, launch.TILE)
        block_c, block_l = cut.layout['BLOCK_C'], cut.layout['BLOCK_L']
        chunk = cut.tiles * block_l
        assert block_c * block_l <= launch.TILE
        assert cut.grid == (samples * -(-channels // block_c), cut.splits)
        assert (cut.splits - 1) * chunk < length <= cut.splits * chunk  # no chunk is empty
        assert cut.splits <= 65535  # CUDA's limit for the second axis of a grid
        assert cut.tiles == 1 or cut.grid[0] * cut.splits > 0.8 * programs


# ----------------------------------------------------------------------------------------------
# The backend


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


def test_operators_pass_their_arguments_on():
    """What is registered for CUDA, under another name and for the device of the tests."""
    library = torch.library.Library('wsbcn_mm_test', 'DEF')
    for name in backend.OPERATORS:
        schema = str(getattr(torch.ops.wsbcn_mm, name).default._schema)
        library.define(schema.removeprefix('wsbcn_mm::'))
        library.impl(name, backend.launcher(name), DEVICE.upper())
    ops = torch.ops.wsbcn_mm_test

    x, grad, (running_mean, running_var) = make_input((2, 6, 9)), rand(2, 6, 9), make_buffers(6)
    parameters, rate = make_parameters(6, 3), torch.tensor(0.4, device=DEVICE)
    affine = [parameters[name] for name in PARAMETERS]
    expected = run(x, 3, (running_mean, running_var), parameters, grad, 'estimate', rate)
    running = (running_mean, running_var, None)
    for result, name in zip(ops.row_moments(x), 'mq'):
        assert torch.equal(result, expected[name])
    y, *statistics = ops.normalize_with_estimates(x, 3, *running, *affine, None, rate, 1e-3)
    assert torch.equal(y, expected['y'])
    assert torch.equal(running_mean, expected['running_mean'])
    assert torch.equal(running_var, expected['running_var'])
    assert torch.equal(ops.evaluate(x, 3, *running, *affine, 1e-3), y)
    assert torch.equal(ops.normalize(x, 3, *statistics[:4], *affine, 1e-3)[0], y)
    gradients = ops.normalize_backward(grad, x, 3, *statistics, *affine, 1e-3, False)
    for name, result in zip(('x', *PARAMETERS), gradients):
        assert torch.equal(result, expected[f'grad_{name}']), name
    in_batch = run(x, 3, (running_mean, running_var), parameters, grad, 'batch', 0.3)
    batch = ops.normalize_with_batch(x, 3, *running, *affine, 0.3, None, 1e-3)
    assert torch.equal(batch[0], in_batch['y'])

    w_hat, mean, sigma = ops.standardize(x, 1e-5, 'var_eps', torch.float16)
    assert torch.equal(w_hat, launch.standardize(x, 1e-5, 'var_eps', torch.float16)[0])
    gradient = ops.standardize_backward(grad, x, mean, sigma, 1e-5, 'var_eps')
    assert torch.equal(gradient, launch.standardize_backward(grad, x, mean, sigma, 1e-5, 'var_eps'))


# ----------------------------------------------------------------------------------------------
# Compilation, and what only a GPU shows

COMPILE = """
import types
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.backends.triton import launch

class Machine:
    '''What Triton asks of a GPU before it launches something: an H100 on which nothing runs.'''
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

class Compiler:
    '''In place of a kernel: compiles what would be launched.'''
    def __init__(self, kernel):
        self.kernel = kernel
    def __getitem__(self, grid):
        def launch(*args, **constants):
            result = self.kernel.warmup(*args, grid=grid, **constants)
            compiled.add((self.kernel.__name__, result.hash))
        return launch

@triton.jit
def probe(x):
    tl.store(x, 1.0)

triton.runtime.driver.set_active(Machine())
try:
    probe.warmup(torch.empty(1), grid=(1,)).asm['cubin']
except Exception as error:
    print(f'this Triton cannot compile without a GPU: {error!r}')
    raise SystemExit(77)

compiled = set()
kernels = {k: v for k, v in vars(launch.kernels).items() if isinstance(v, triton.JITFunction)}
launch.kernels = types.SimpleNamespace(
    **{name: Compiler(kernel) for name, kernel in kernels.items() if name[0] != '_'}
)

def bcn(x, groups, outer, rate, through_statistics):
    w = torch.empty(x.size(1))
    a = torch.empty(outer) if outer else None
    launch.row_moments(x)
    _, statistics = launch.normalize_with_estimates(
        x, groups, Running(w, w), Affine(w, w, a, a), rate, 1e-5
    )
    launch.normalize(x, groups, *statistics[:4], Affine(None, None, a, a), 1e-5)
    launch.normalize_backward(
        x, x, groups, statistics, Affine(w, None, a, a), 1e-5, through_statistics
    )

for dtype, formula in zip(
    (torch.float32, torch.bfloat16, torch.float64), ('paper', 'std_eps', 'var_eps')
):
    bcn(torch.empty(2, 64, 200, 304, dtype=dtype), 32, 32, 0.1, False)
    before = len(compiled)
    bcn(torch.empty(2, 64, 192, 328, dtype=dtype), 32, 32, 0.1, False)
    assert len(compiled) == before, 'another size of image compiled something anew'
    weight = torch.empty(8, 3, 3, 3, dtype=dtype)
    w_hat, mean, sigma = launch.standardize(weight, 1e-5, formula, torch.bfloat16)
    launch.standardize_backward(w_hat, weight, mean, sigma, 1e-5, formula)
channels_last = torch.empty(2, 6, 25, 27).to(memory_format=torch.channels_last)
bcn(channels_last, 2, 6, None, True)
bcn(torch.empty(2, 64), 1, 0, 0.1, True)
print(len({name for name, _ in compiled}), len(compiled))
"""


def test_kernels_compile(tmp_path, monkeypatch):
    """Everything that `launch` launches, down to machine code for an H100, on any machine."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # nothing compiled earlier
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[2]))
    script = tmp_path / 'compile_kernels.py'  # Triton reads the source of what it compiles
    script.write_text(COMPILE)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=300
    )
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stderr
    kernels, variants = map(int, result.stdout.split())
    assert kernels == 9 and variants >= 3 * kernels


needs_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')


@needs_gpu
def test_cuda_graph():
    x, grad = (make_input((2, 64, 30, 31), dtype=torch.float32) for _ in range(2))
    weight = make_input((8, 3, 3, 3), dtype=torch.float32)
    args = x, 32, make_buffers(64), make_parameters(64, 32), grad, 'estimate'

    def everything():
        w_hat, mean, sigma = launch.standardize(weight, 1e-5, 'paper', torch.float16)
        dw = launch.standardize_backward(w_hat, weight, mean, sigma, 1e-5, 'paper')
        return run(*args) | dict(w_hat=w_hat, dw=dw)

    everything()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for value in (x, grad, weight):
        value.copy_(make_input(value.shape))
    graph.replay()
    expected = everything()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS)
def test_more_than_2_to_the_31_elements(layout):
    shape, groups = (3, 8, 9600, 9600), 4
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip('needs 32 GB of free memory')
    x = in_layout(torch.randn(shape, device=DEVICE, dtype=torch.float16), layout)
    assert x.numel() > 2**31
    check_last_group(x, groups)


def check_last_group(x, groups):
    """Of the last sample: all of x would not fit in float64."""
    buffers, width = make_buffers(x.size(1), torch.float32), x.size(1) // groups
    affine = Affine(None, None, None, None)
    y, statistics = launch.normalize_with_estimates(
        x, groups, Running(*buffers), affine, None, 1e-5
    )
    grad = y
    dx, _ = launch.normalize_backward(grad, x, groups, statistics, affine, 1e-5, False)
    part = double(x[-1:, -width:]).requires_grad_()
    expected = reference.normalize(part, *(double(b[-width:]) for b in buffers), 1)
    (gradient,) = torch.autograd.grad(expected, part, double(grad[-1:, -width:]))
    assert_close(statistics.m[-1, -width:], part.detach().mean((0, 2, 3)), torch.float32, 'm')
    assert_close(y[-1:, -width:], expected.detach(), x.dtype, 'y')
    assert_close(dx[-1:, -width:], gradient, x.dtype, 'grad_x')
