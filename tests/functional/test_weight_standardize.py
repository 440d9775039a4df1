"""`weight_standardize` against the specification."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.functional.cases import (
    FORMULAS,
    TOLERANCES,
    assert_at_most_twice,
    assert_equal,
    exact,
    make_input,
    of_far_rows,
    rand,
)
from wsbcn_mm import reference, weight_standardize

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend


WEIGHTS = [(6, 4, 3, 3), (5, 7, 1, 1), (4, 1, 2), (3, 2, 2, 2, 2), (7, 9), (1, 2, 1, 1)]


@pytest.mark.parametrize('eps', [1e-5, 1e-2])
@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('shape', WEIGHTS)
def test_ws_equals_reference(shape, formula, eps, dtype):
    for layout in ('contiguous', 'channels_last', 'sliced', 'transposed'):
        weight = make_input(shape, layout, dtype)
        if weight is None:
            continue
        g, h = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)

        def run(standardize, weight, g, h):
            weight = weight.detach().requires_grad_()
            w_hat = standardize(weight, eps, formula)
            assert w_hat.shape == weight.shape and w_hat.dtype == weight.dtype
            (grad,) = torch.autograd.grad(w_hat, weight, g, create_graph=True)
            if dtype != torch.float64:  # the second derivative takes differences of roundings
                return {'w_hat': w_hat, 'grad': grad}
            (second,) = torch.autograd.grad(grad, weight, h)
            return {'w_hat': w_hat, 'grad': grad, 'second': second}

        actual = run(weight_standardize, weight, g, h)
        expected = run(reference.weight_standardize, *exact((weight, g, h)))
        assert_equal(actual, expected, max(1e-9, TOLERANCES[dtype]))


@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('check', [gradcheck, gradgradcheck])
def test_ws_numeric_gradients(check, formula):
    weight = make_input((3, 2, 2, 2)).requires_grad_()
    assert check(lambda w: weight_standardize(w, 1e-3, formula), (weight,))


def test_ws_default_is_the_paper_with_eps_1e_5():
    weight = rand(4, 3, 3, 3)
    expected = reference.weight_standardize(weight, 1e-5, 'paper')
    torch.testing.assert_close(weight_standardize(weight), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('formula', ['paper', 'var_eps'])
def test_ws_of_a_zero_filter_has_a_bounded_gradient(formula):
    """eps inside the root: (g - mean(g)) / sqrt(eps). With std + eps it is useless or NaN."""
    weight, g = torch.zeros(4, 8, 3, 3).requires_grad_(), rand(4, 8, 3, 3, dtype=torch.float32)
    w_hat = weight_standardize(weight, 1e-5, formula)
    assert torch.equal(w_hat, torch.zeros_like(w_hat))
    (grad,) = torch.autograd.grad(w_hat, weight, g)
    expected = (g - g.mean((1, 2, 3), keepdim=True)) / 1e-5**0.5
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_does_not_change_its_argument(formula):
    weight = rand(4, 3, 3, 3)
    before = weight.clone()
    w_hat = weight_standardize(weight, formula=formula)
    assert torch.equal(weight, before) and w_hat.data_ptr() != weight.data_ptr()


def test_ws_of_no_output_channels_is_empty():
    weight = torch.zeros(0, 4, 3, 3)
    assert weight_standardize(weight).shape == weight.shape


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_errs_at_most_twice_as_much_as_plain_torch(formula, dtype):
    weight, g = (0.05 * rand(16, 8, 3, 3) + 0.02).to(dtype), rand(16, 8, 3, 3, dtype=dtype)

    def run(standardize, weight, g):
        weight = weight.detach().requires_grad_()
        w_hat = standardize(weight, 1e-5, formula)
        return {'w_hat': w_hat.detach(), 'grad': torch.autograd.grad(w_hat, weight, g)[0]}

    oracle = run(reference.weight_standardize, weight.double(), g.double())
    ours, theirs = (run(f, weight, g) for f in (weight_standardize, reference.weight_standardize))
    assert all(v.dtype == dtype for v in ours.values())
    assert_at_most_twice(ours, theirs, oracle, summed=weight[0].numel())


@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_stays_accurate_in_float32_at_mean_1000(formula):
    weight = 1000 + rand(8, 16, 3, 3, dtype=torch.float32)
    expected = reference.weight_standardize(weight.double(), 1e-5, formula)
    actual = weight_standardize(weight, 1e-5, formula)
    assert (actual - expected).abs().max() < 1e-3


@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_of_rows_far_from_zero(formula):
    """The mean, rounded to float32, would be off by a five-hundredth of the deviation."""
    case = of_far_rows(formula)
    weight = case['weight'].requires_grad_()
    w_hat = weight_standardize(weight, 1e-8, formula)
    (grad,) = torch.autograd.grad(w_hat, weight, case['g'])
    for found, expected in ((w_hat, case['w_hat']), (grad, case['grad'])):
        error = (found.detach().double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5


def test_results_and_gradients_have_memory_that_can_be_freed():
    """As that of any tensor: sharding frees gradients so."""
    weight = torch.randn(64, 64, 3, 3, requires_grad=True)  # large: it comes from a pool
    w_hat = weight_standardize(weight)
    w_hat.sum().backward()
    for tensor in (w_hat.detach(), weight.grad):
        values = tensor.clone()
        tensor.untyped_storage().resize_(0)
        tensor.untyped_storage().resize_(values.untyped_storage().nbytes())
        assert torch.equal(tensor.copy_(values), values)
