"""Batch-Channel Normalization by the Triton kernels equals the specification."""

import pytest
import torch

from tests.backends.triton.cases import (
    DEVICE,
    DTYPES,
    LAST,
    LAYOUTS,
    MODES,
    assert_close,
    check,
    double,
    in_layout,
    launch,
    make_affine,
    make_input,
    make_running,
    rand,
    run,
    spec,
)
from wsbcn_mm import reference
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.backends.ops import accumulation_dtype

# (shape, num_groups): 1d to 3d, odd sizes, one sample, one position, no axis of positions at all;
# one group (LayerNorm as the second stage), a group per channel (InstanceNorm).
# The interpreter's time goes into programs, not values: few rows, each of several tiles.
SHAPES = [
    ((2, 6, 5, 4), 3),
    ((1, 4, 12, 4), 2),
    ((1, 20, 3, 2), 1),
    ((2, 3, 7), 3),
    ((2, 4, 3, 4, 3), 2),
    ((3, 8, 1, 1), 4),
    ((5, 12), 3),
]
CASES = [
    (shape, groups, layout)
    for shape, groups in SHAPES
    for layout in LAYOUTS
    if layout == 'contiguous' or len(shape) in LAST
]


# In small tiles the first shape in all modes, every other in one: each launch has many programs.
ONE_MODE = [
    (*case, mode)
    for i, case in enumerate(CASES)
    for j, mode in enumerate(MODES)
    if i < 2 or i % 3 == j
]


@pytest.mark.parametrize('cut', ['held'], indirect=True)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shape, groups, layout', CASES)
def test_bcn_equals_reference(shape, groups, layout, mode, cut):
    x, grad = make_input(shape, layout), make_input(shape, layout)
    check(x, groups, make_running(shape[1]), make_affine(shape[1], groups), grad, mode)


@pytest.mark.parametrize('cut', ['small tiles'], indirect=True)
@pytest.mark.parametrize('shape, groups, layout, mode', ONE_MODE)
def test_bcn_equals_reference_in_small_tiles(shape, groups, layout, mode, cut):
    x, grad = make_input(shape, layout), make_input(shape, layout)
    check(x, groups, make_running(shape[1]), make_affine(shape[1], groups), grad, mode)


@pytest.mark.parametrize('cut', ['passes'], indirect=True)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('shape, groups, layout', [*CASES[:2], CASES[4], CASES[-1]])
def test_bcn_equals_reference_however_it_is_cut(shape, groups, layout, mode, cut):
    x, grad = make_input(shape, layout), make_input(shape, layout)
    check(x, groups, make_running(shape[1]), make_affine(shape[1], shape[1]), grad, mode)


@pytest.mark.parametrize('cut', ['held', 'passes'], indirect=True)
@pytest.mark.parametrize('dtype', DTYPES[1:])
@pytest.mark.parametrize('mode, layout', [*zip(MODES, LAYOUTS * 2), ('estimate', 'channels_last')])
def test_bcn_in_every_dtype(mode, layout, dtype, cut):
    shape, groups = (2, 8, 3, 8), 2
    x, grad = make_input(shape, layout, dtype), make_input(shape, layout, dtype)
    check(x, groups, make_running(8, dtype), make_affine(8, groups, dtype), grad, mode)


@pytest.mark.parametrize('outer', [0, 3, 6])
@pytest.mark.parametrize('mode', MODES)
def test_outer_affine_per_group_per_channel_or_none(mode, outer, cut):
    x, grad = make_input((2, 6, 5)), rand(2, 6, 5)
    check(x, 3, make_running(6), make_affine(6, outer), grad, mode)


@pytest.mark.parametrize('given', Affine._fields)
@pytest.mark.parametrize('cut', ['held', 'passes'], indirect=True)
def test_every_parameter_may_be_given_alone(given, cut):
    x, grad, running = make_input((2, 8, 3, 5)), rand(2, 8, 3, 5), make_running(8)
    alone = dict.fromkeys(Affine._fields) | {given: getattr(make_affine(8, 4), given)}
    for mode in ('estimate', 'batch'):
        check(x, 4, running, Affine(**alone), grad, mode)


def test_weight_and_bias_may_differ_in_size_going_forward(cut):
    x, running = make_input((2, 8, 15)), make_running(8)
    affine = make_affine(8, 4)._replace(bias=rand(8))
    y = launch.evaluate(x, 4, running, affine, 1e-5)
    assert_close(y, reference.normalize(x, *running[:2], 4, *affine), x.dtype, 'y')


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_parameters_and_buffers_may_be_strided(mode, cut):
    x, grad = make_input((2, 6, 9)), rand(2, 6, 9)
    affine = Affine(*(torch.stack([v, v], 1)[:, 1] for v in make_affine(6, 3)))
    *buffers, counts, _ = make_running(6)
    pairs = [torch.stack([b, b], 1) for b in buffers]
    running = Running(pairs[0][:, 0], pairs[1][:, 0], counts)
    assert not any(t.is_contiguous() for t in (*affine, *running[:2]))
    check(x, 3, running, affine, grad, mode)

    expected = spec(x, 3, running, affine, grad, mode)
    beside = [pair[:, 1].clone() for pair in pairs]
    function = dict(estimate=launch.normalize_with_estimates, batch=launch.normalize_with_batch)
    function[mode](x, 3, running, affine, 0.3, 1e-3)
    assert_close(running.mean, expected['running_mean'], x.dtype, 'running_mean')
    assert_close(running.var, expected['running_var'], x.dtype, 'running_var')
    assert all(torch.equal(pair[:, 1], before) for pair, before in zip(pairs, beside))


@pytest.mark.parametrize('dtype', DTYPES)
def test_update_in_every_dtype_of_the_buffers(dtype):
    x, grad = (make_input((2, 6, 9), dtype=torch.float32) for _ in range(2))
    args = x, 3, make_running(6, dtype), make_affine(6, 3), grad, 'estimate'
    actual, expected = run(*args), spec(*args)
    for name in ('mean', 'var'):
        # x is normalised with what has not been rounded to the buffers.
        assert_close(actual[name], expected[name], torch.float32, name)
        assert actual[f'running_{name}'].dtype == dtype
        assert_close(actual[f'running_{name}'], double(actual[name]), dtype, name)


@pytest.mark.parametrize('mode', ['estimate', 'batch'])
def test_rate_may_be_a_tensor_of_any_dtype(mode):
    x, grad, running = make_input((2, 6, 9)), rand(2, 6, 9), make_running(6)
    args = x, 3, running, make_affine(6, 3), grad, mode
    expected = run(*args, rate=0.25)
    for dtype in DTYPES:
        actual = run(*args, rate=torch.tensor(0.25, dtype=dtype, device=DEVICE))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize('cut', ['held', 'small tiles'], indirect=True)
def test_rate_0_keeps_and_rate_1_replaces_the_buffers(cut):
    x, grad, running = make_input((2, 6, 9)), rand(2, 6, 9), make_running(6)
    args = x, 3, running, make_affine(6, 3), grad, 'estimate'
    kept = run(*args, rate=0.0)
    assert torch.equal(kept['running_mean'], running.mean)
    assert torch.equal(kept['running_var'], running.var)
    new = run(*args, rate=1.0)
    assert_close(new['running_mean'], x.mean((0, 2)), x.dtype, 'running_mean')
    second = (x - running.mean[:, None]).square().mean((0, 2))
    assert_close(new['running_var'], second, x.dtype, 'running_var')


@pytest.mark.parametrize('cut', ['held', 'small tiles'], indirect=True)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('function', ['normalize_with_estimates', 'normalize_with_batch'])
def test_counts_and_channels_that_are_not_finite(function, dtype, cut):
    """NaN, and what the dtype of the buffers cannot hold: the estimates stay, `counts` say so."""
    x = make_input((3, 4, 9), dtype=torch.float32)
    x[1, 2, 5], x[0, 3, 0] = 1e30, torch.nan
    running = make_running(4, dtype)
    before = running.mean.clone(), running.var.clone()
    for _ in range(2):
        getattr(launch, function)(x, 2, running, Affine(None, None, None, None), 0.1, 1e-5)
    assert running.counts.tolist() == [[6, 6, 0, 0], [0, 0, 2, 2]]
    assert running.num_batches_tracked == 9
    for value, old in zip(running[:2], before):
        assert torch.equal(value[2:], old[2:]) and value.isfinite().all()
        assert (value[:2] != old[:2]).all()


@pytest.mark.parametrize('dtype', DTYPES)
def test_without_a_rate_the_buffers_are_left_alone(dtype):
    x, grad = make_input((5, 6, 9), dtype=dtype), rand(5, 6, 9, dtype=dtype)
    running = make_running(6)
    actual = run(x, 3, running, make_affine(6, 3), grad, 'evaluate')
    for name, before in zip(('mean', 'var'), running):
        assert torch.equal(actual[f'running_{name}'], before)
        assert torch.equal(actual[name], before.to(accumulation_dtype(dtype)))
    assert (running.counts == 0).all() and running.num_batches_tracked == 7


@pytest.mark.parametrize('cut', ['held', 'passes'], indirect=True)
def test_every_way_to_the_same_statistics_gives_the_same(cut):
    """`evaluate`: y alone; `normalize`: the second half."""
    x, running, affine = make_input((2, 6, 5, 7)), make_running(6), make_affine(6, 3)
    y, statistics = launch.normalize_with_estimates(x, 3, running, affine, None, 1e-3)
    assert torch.equal(launch.evaluate(x, 3, running, affine, 1e-3), y)
    again, *groups = launch.normalize(x, 3, *statistics[:4], affine, 1e-3)
    assert torch.equal(again, y)
    assert all(torch.equal(a, b) for a, b in zip(groups, statistics[4:]))
    m, q = launch.row_moments(x)
    assert_close(m, statistics.m, x.dtype, 'm')
    assert_close(q, statistics.q, x.dtype, 'q')


def test_gradients_come_in_any_layout_and_dtype():
    x, grad = make_input((2, 6, 4, 5)), make_input((2, 6, 4, 5), dtype=torch.float32)
    args = x, 3, make_running(6), make_affine(6, 3)
    expected = run(*args, grad.double(), 'estimate')
    actual = run(*args, in_layout(grad, 'channels_last'), 'estimate')
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# ----------------------------------------------------------------------------------------------
# Precision


@pytest.mark.parametrize('cut', ['held', 'passes', 'small tiles'], indirect=True)
@pytest.mark.parametrize('layout', LAYOUTS)
def test_moments_far_from_zero(layout, cut):
    """In float32, mean 1000 and standard deviation 1: E[x^2] - E[x]^2 errs by some per cent."""
    x = in_layout((1000 + rand(1, 4, 5, 7)).float(), layout)
    mean, variance = x.double().mean((2, 3)), x.double().var((2, 3), unbiased=False)
    naive = x.square().mean((2, 3)) - x.mean((2, 3)).square()
    assert ((naive - variance) / variance).abs().max() > 1e-2
    _, statistics = launch.normalize_with_estimates(
        x, 2, make_running(4), make_affine(4, 0), None, 1e-5
    )
    for m, q in (launch.row_moments(x), statistics[:2]):
        assert ((q - variance) / variance).abs().max() < 3e-5
        assert (m - mean).abs().max() <= 2**-14  # one step of float32 there


@pytest.mark.parametrize('mode', MODES)
def test_bcn_far_from_zero(mode, cut):
    x, grad = (1000 + rand(1, 4, 5, 7)).float(), rand(1, 4, 5, 7, dtype=torch.float32)
    running = Running(*(torch.full((4,), value, device=DEVICE) for value in (999.0, 0.5)))
    args = x, 2, running, make_affine(4, 2), grad, mode
    actual, expected = run(*args), spec(*args)
    for name in ('y', 'grad_x'):  # the means are rounded, to 2^-14
        error = (actual[name].double() - expected[name]).abs().max()
        assert error < 5e-4, f'{name}: {error:.1e}'


@pytest.mark.parametrize('value', [0.0, 0.1, -1000.3, 1e6])
def test_constant_rows_have_no_variance(value, cut):
    x = torch.full((2, 4, 37), value, device=DEVICE)
    _, statistics = launch.normalize_with_estimates(
        x, 2, make_running(4), make_affine(4, 0), None, 1e-5
    )
    for m, q in (launch.row_moments(x), statistics[:2]):
        assert (m == x[:, :, 0]).all() and (q == 0).all()


@pytest.mark.parametrize('cut', ['held', 'small tiles'], indirect=True)
@pytest.mark.parametrize('mode', MODES)
def test_results_are_the_same_bit_for_bit_in_every_run(mode, cut):
    x, grad = (make_input((1, 4, 5, 7), dtype=torch.float32) for _ in range(2))
    args = x, 2, make_running(4), make_affine(4, 2), grad, mode
    first, second = run(*args), run(*args)
    assert all(torch.equal(first[name], second[name]) for name in first)
