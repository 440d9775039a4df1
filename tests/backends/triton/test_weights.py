"""Weight Standardization by the Triton kernels equals the specification, alone and together."""

import pytest
import torch

from tests.backends.triton.cases import (
    DEVICE,
    DTYPES,
    FORMULAS,
    LAYOUTS,
    TOLERANCE,
    assert_close,
    double,
    in_layout,
    launch,
    make_input,
    rand,
)
from tests.functional.cases import of_far_rows
from wsbcn_mm import reference
from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.backends.triton import weights as weights_module


def check_results(weight, grad, formula, eps, w_hat, mean, sigma, dw):
    exact = double(weight).requires_grad_()
    expected = reference.weight_standardize(exact, eps, formula)
    (expected_grad,) = torch.autograd.grad(expected, exact, double(grad))

    accumulated = accumulation_dtype(weight.dtype)
    assert w_hat.stride() == weight.stride()
    assert dw.dtype == weight.dtype and dw.stride() == weight.stride()
    assert mean.dtype == sigma.dtype == accumulated
    rows = exact.detach().flatten(1)
    variance = rows.var(1, unbiased=formula != 'paper')
    deviation = variance.sqrt() if formula == 'std_eps' else (variance + eps).sqrt()
    assert_close(mean, rows.mean(1), accumulated, 'mean')
    assert_close(sigma, deviation, accumulated, 'sigma')
    dtype = max(w_hat.dtype, accumulated, key=TOLERANCE.get)
    assert_close(w_hat, expected.detach(), dtype, 'w_hat')
    assert_close(dw, expected_grad, weight.dtype, 'grad')


def check_weight(weight, grad, formula, dtype, eps=1e-3):
    w_hat, mean, sigma = launch.standardize(weight, eps, formula, dtype)
    assert w_hat.dtype == dtype
    dw = launch.standardize_backward(grad, weight, mean, sigma, eps, formula)
    check_results(weight, grad, formula, eps, w_hat, mean, sigma, dw)


def check_many(weights, formula, dtype, eps=1e-3):
    """All in one call; the backward pass of the second half alone, too, into the gradients."""
    rows = sum(weight.size(0) for weight in weights)
    statistics = accumulation_dtype(weights[0].dtype)
    mean, sigma = (torch.empty(rows, dtype=statistics, device=DEVICE) for _ in range(2))
    w_hats = [torch.empty_like(weight, dtype=dtype) for weight in weights]
    launch.standardize_all(weights, eps, formula, w_hats, mean, sigma)
    grads = [torch.randn_like(w_hat) for w_hat in w_hats]
    offsets = [sum(weight.size(0) for weight in weights[:k]) for k in range(len(weights))]
    dws = [torch.empty_like(weight) for weight in weights]
    launch.standardize_all_backward(grads, weights, offsets, mean, sigma, eps, formula, dws)
    for k, weight in enumerate(weights):
        place = slice(offsets[k], offsets[k] + weight.size(0))
        check_results(weight, grads[k], formula, eps, w_hats[k], mean[place], sigma[place], dws[k])
    if dtype == weights[0].dtype:
        half = len(weights) // 2
        given = grads[half:], weights[half:], offsets[half:]
        launch.standardize_all_backward(*given, mean, sigma, eps, formula, grads[half:])
        assert all(torch.equal(a, b) for a, b in zip(grads[half:], dws[half:]))


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
    dw = launch.standardize_backward(grad, weight, mean, sigma, 1e-4, formula)
    centred = double(grad) - double(grad).mean(1, keepdim=True)
    assert_close(dw, centred / denominator[:, None], torch.float32, 'grad')


@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_of_rows_far_from_zero(formula):
    case = of_far_rows(formula)
    weight, g = case['weight'].to(DEVICE), case['g'].to(DEVICE)
    w_hat, mean, sigma = launch.standardize(weight, 1e-8, formula, torch.float32)
    dw = launch.standardize_backward(g, weight, mean, sigma, 1e-8, formula)
    assert_close(w_hat, case['w_hat'].to(DEVICE), torch.float32, 'w_hat')
    assert_close(dw, case['grad'].to(DEVICE), torch.float32, 'grad')


# ----------------------------------------------------------------------------------------------
# Many weights


@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_many_weights_at_once_equal_reference(dtype, formula, launches):
    """Of any sizes and layouts: rows a vector divides and others, channels_last, a linear one."""
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(5, 3, 3, 3), (4, 8, 1, 1), (3, 2, 7, 7), (2, 12), (1, 4, 3, 2, 2)]
    weights = [make_input(shape, dtype=kind) for shape in shapes]
    weights[0] = in_layout(weights[0], 'channels_last')
    check_many(weights, formula, dtype)
    if weights_module.AT_ONCE == 1:  # Triton 3.2 has no tuples
        assert set(launches) == {'standardize', 'standardize_backward'}
        return
    forward, backward, *half = launches
    assert (forward, backward) == ('standardize_many', 'standardize_many_backward')
    assert half == ['standardize_many_backward'] * (dtype == kind)


@pytest.mark.skipif(weights_module.AT_ONCE == 1, reason='Triton 3.2 has no tuples')
def test_more_weights_than_a_launch_takes(monkeypatch, launches):
    monkeypatch.setattr(weights_module, 'AT_ONCE', 2)
    weights = [make_input((2, width)) for width in (4, 7, 8, 3, 5)]
    check_many(weights, 'paper', torch.float64)
    assert launches[:3] == ['standardize_many', 'standardize_many', 'standardize']


def test_one_launch_each_where_triton_has_no_tuples(monkeypatch, launches):
    monkeypatch.setattr(weights_module, 'AT_ONCE', 1)
    check_many([make_input((2, width)) for width in (4, 7, 8)], 'paper', torch.float64)
    assert launches[:6] == ['standardize'] * 3 + ['standardize_backward'] * 3


def test_weights_that_start_anywhere_in_memory():
    memory = make_input((60, 1), dtype=torch.float32).flatten()
    weights = [memory[1:25].view(3, 8), memory[25:57].view(4, 8)]
    assert any(weight.data_ptr() % 16 for weight in weights)
    check_many(weights, 'paper', torch.float32)


def test_what_does_not_fit_a_weight_is_refused():
    weight, mean = make_input((4, 3, 3, 3)), rand(4)
    with pytest.raises(ValueError, match=r'mean must have shape \(4,\)'):
        launch.standardize_backward(weight, weight, mean[:3], mean, 1e-5, 'paper')
    with pytest.raises(ValueError, match=r'grad must have shape \(4, 3, 3, 3\)'):
        launch.standardize_backward(weight[:2], weight, mean, mean, 1e-5, 'paper')
    with pytest.raises(TypeError, match=r'sigma must be .* torch.float64\n  got torch.float32'):
        launch.standardize_backward(weight, weight, mean, mean.float(), 1e-5, 'paper')
    with pytest.raises(ValueError, match='weight: expected a contiguous or channels_last tensor'):
        launch.standardize(weight.transpose(1, 2), 1e-5, 'paper', torch.float64)
    with pytest.raises(TypeError, match=r'weight must be one of torch.float32'):
        launch.standardize(weight.long(), 1e-5, 'paper', torch.float64)
    pair, out = [weight, weight], [torch.empty_like(weight) for _ in range(2)]
    both = rand(8)
    with pytest.raises(ValueError, match=r'mean must have shape \(8,\)'):
        launch.standardize_all(pair, 1e-5, 'paper', out, mean, mean)
    with pytest.raises(ValueError, match='out must have a tensor per weight\n  got 1'):
        launch.standardize_all(pair, 1e-5, 'paper', out[:1], both, both)
    with pytest.raises(ValueError, match=r'out\[1\] must lie in memory as weights\[1\] does'):
        last = in_layout(out[1], 'channels_last')
        launch.standardize_all(pair, 1e-5, 'paper', [out[0], last], both, both)
    with pytest.raises(TypeError, match='out must have one dtype'):
        launch.standardize_all(pair, 1e-5, 'paper', [out[0], out[1].float()], both, both)
    with pytest.raises(ValueError, match=r'offsets\[1\] must leave room for 4 rows of 8\n  got 5'):
        launch.standardize_all_backward(pair, pair, [0, 5], both, both, 1e-5, 'paper', out)
