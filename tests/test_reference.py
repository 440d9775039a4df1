"""Small facts of the papers, by hand: the specification itself is right.

Nothing here calls the fast implementations; those are held to `reference` in tests/functional.
"""

import pytest
import torch

from wsbcn_mm import reference

FORMULAS = ('paper', 'std_eps', 'var_eps')


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def assert_close(actual, expected, atol=1e-12):
    torch.testing.assert_close(
        actual, torch.as_tensor(expected, dtype=torch.float64), rtol=0, atol=atol
    )


# ----------------------------------------------------------------------------------------------
# Weight Standardization


@pytest.mark.parametrize(
    'formula, denominator',
    # w = [1, 2, 3, 6]: mean 3, squares 4 + 1 + 0 + 9 = 14; biased var 14/4, unbiased 14/3.
    [
        ('paper', (3.5 + 0.1) ** 0.5),
        ('std_eps', (14 / 3) ** 0.5 + 0.1),
        ('var_eps', (14 / 3 + 0.1) ** 0.5),
    ],
)
def test_ws_by_hand(formula, denominator):
    weight = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64).view(1, 2, 1, 2)
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0], dtype=torch.float64).view(1, 2, 1, 2)
    w_hat = reference.weight_standardize(weight, eps=0.1, formula=formula)
    assert_close(w_hat, expected / denominator)


def test_ws_default_is_the_paper_with_eps_1e_5():
    weight = rand(3, 2, 3, 3)
    assert torch.equal(
        reference.weight_standardize(weight),
        reference.weight_standardize(weight, eps=1e-5, formula='paper'),
    )


def test_ws_treats_every_output_channel_alone():
    weight = rand(3, 4, 3, 3)
    together = reference.weight_standardize(weight)
    for o in range(3):
        assert_close(together[o : o + 1], reference.weight_standardize(weight[o : o + 1]))


def test_ws_formulas_without_eps_differ_by_bessels_factor():
    weight, n = rand(5, 4, 3, 3), 36
    paper, std_eps, var_eps = (reference.weight_standardize(weight, 0.0, f) for f in FORMULAS)
    assert_close(std_eps, var_eps)
    assert_close(paper, var_eps * (n / (n - 1)) ** 0.5)
    # var_eps is the paper's formula with a smaller eps and that factor (used by the eager backend).
    shrunk = reference.weight_standardize(weight, 1e-2 * (n - 1) / n, 'paper')
    factor = ((n - 1) / n) ** 0.5
    assert_close(reference.weight_standardize(weight, 1e-2, 'var_eps'), factor * shrunk)


def test_ws_formulas_differ_where_the_paper_facts_say():
    """Up to 6 % at weight std 0.02 and small fan-in, 70 % for tiny weights (paper.md, 1)."""
    shape = rand(64, 9)
    shape = (shape - shape.mean(1, keepdim=True)) / shape.std(1, keepdim=True)

    def largest_difference(std):
        paper, *others = (reference.weight_standardize(std * shape, 1e-5, f) for f in FORMULAS)
        return max((paper / other - 1).abs().max() for other in others)

    assert 0.04 < largest_difference(0.02) < 0.06 + 0.01
    assert largest_difference(1e-4) > 0.69


def test_ws_of_a_zero_filter_is_zero_in_every_formula():
    for formula in FORMULAS:
        assert torch.equal(
            reference.weight_standardize(torch.zeros(2, 4, 3, 3), formula=formula),
            torch.zeros(2, 4, 3, 3),
        )


def ws_gradient(eps, formula='paper'):
    weight, g = rand(6, 4, 3, 3).mul(0.05).requires_grad_(), rand(6, 4, 3, 3)
    w_hat = reference.weight_standardize(weight, eps, formula)
    (grad,) = torch.autograd.grad(w_hat, weight, g)
    return [t.detach().flatten(1) for t in (weight, w_hat, g, grad)]


@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('eps', [0.0, 1e-3])
def test_ws_gradient_has_no_mean(eps, formula):
    *_, grad = ws_gradient(eps, formula)
    assert_close(grad.sum(1), torch.zeros(6), atol=1e-11)


@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_gradient_is_orthogonal_to_the_weight_without_eps(formula):
    weight, *_, grad = ws_gradient(0.0, formula)
    assert_close((weight * grad).sum(1), torch.zeros(6), atol=1e-11)
    weight, *_, grad = ws_gradient(1e-3, formula)
    assert (weight * grad).sum(1).abs().max() > 1e-3  # eps breaks the scale invariance


def test_ws_norm_identity_and_smoothing():
    """|dL/dw|^2 = (|g|^2 - <w_hat, g>^2 / n) / sigma^2 - <1, dL/dw_centred>^2 / n (eps = 0)."""
    weight, w_hat, g, grad = ws_gradient(0.0)
    n, sigma = 36, weight.std(1, unbiased=False)
    projection = (w_hat * g).sum(1)
    grad_centred = (g - w_hat * projection[:, None] / n) / sigma[:, None]
    expected = (g.square().sum(1) - projection**2 / n) / sigma**2 - grad_centred.sum(1) ** 2 / n
    assert_close(grad.square().sum(1) / expected, torch.ones(6))
    assert (grad.norm(dim=1) <= g.norm(dim=1) / sigma).all()


def test_ws_rejects_an_unknown_formula():
    with pytest.raises(ValueError, match='unknown formula'):
        reference.weight_standardize(rand(2, 2), formula='mean')


# ----------------------------------------------------------------------------------------------
# Batch-Channel Normalization


def test_estimates_by_hand():
    """x = [1, 3], r = 0.1: mu 0.2, var 1.4 (around the OLD mean 0), x1 = [0.676121, 2.366423]."""
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 2)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    mean, var = reference.update_estimates(x, zero, one, 0.1)
    assert_close(mean, [0.2])
    assert_close(var, [1.4])  # 0.9 * 1 + 0.1 * (1 + 9) / 2; around the new mean it would be 1.224
    x1 = (x - mean) / (var + 1e-5).sqrt()
    assert_close(x1.flatten(), [0.676121, 2.366423], atol=5e-7)
    # One group of one channel: the second stage standardizes x1; its eps shows how wide x1 was.
    y, *_ = reference.batch_channel_norm(x, 1, zero, one, training=True, momentum=0.1)
    half = (2.366423 - 0.676121) / 2
    one_sigma = half / (half**2 + 1e-5) ** 0.5
    assert_close(y.flatten(), [-one_sigma, one_sigma], atol=1e-9)


def test_first_stage_by_hand_shows_through_two_channels():
    """Channels of one group: the second stage keeps what the first made of their ratio."""
    x = torch.tensor([[1.0, 3.0], [0.0, 2.0]], dtype=torch.float64).view(1, 2, 2)
    mean = torch.tensor([2.0, -1.0], dtype=torch.float64)
    var = torch.tensor([4.0, 0.25], dtype=torch.float64)
    y = reference.normalize(
        x,
        mean,
        var,
        1,
        torch.tensor([2.0, 1.0]),
        torch.tensor([1.0, -2.0]),
        torch.tensor([3.0]),
        torch.tensor([0.5]),
        eps=0.0,
    )
    # x1: 2 (1-2)/2 + 1 = 0, 2 (3-2)/2 + 1 = 2;  (0+1)/0.5 - 2 = 0, (2+1)/0.5 - 2 = 4.
    # Group: mean 1.5, var (2.25 + 0.25 + 2.25 + 6.25) / 4 = 2.75.
    x1 = torch.tensor([0.0, 2.0, 0.0, 4.0], dtype=torch.float64)
    assert_close(y.flatten(), 3 * (x1 - 1.5) / 2.75**0.5 + 0.5)


def test_eps_stands_inside_both_roots():
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 2)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    y = reference.normalize(x, zero, one, 1, eps=3.0)
    # Stage 1: x / sqrt(1 + 3) = [0.5, 1.5]; stage 2: (+-0.5) / sqrt(0.25 + 3).
    assert_close(y.flatten(), [-0.5 / 3.25**0.5, 0.5 / 3.25**0.5])


def test_estimates_are_constants_for_the_gradient_and_used_after_the_update():
    x, zero, one = rand(2, 4, 5), torch.zeros(4).double(), torch.ones(4).double()
    x.requires_grad_()
    y, mean, var = reference.batch_channel_norm(x, 2, zero, one, training=True, momentum=0.1)
    assert not mean.requires_grad and not var.requires_grad
    g = rand(2, 4, 5)
    (grad,) = torch.autograd.grad(y, x, g)
    expected = reference.normalize(x, mean, var, 2)
    assert_close(y, expected)
    assert_close(grad, torch.autograd.grad(expected, x, g)[0])
    assert not torch.allclose(y, reference.normalize(x, zero, one, 2))


def test_batch_mode_is_torchs_batch_norm_then_group_norm():
    x, weight, bias = rand(3, 6, 4, 5) * 2 + 1, rand(6), rand(6)
    batch_weight, batch_bias = rand(6), rand(6)
    mean, var = rand(6), rand(6).exp()
    torch_mean, torch_var = mean.clone(), var.clone()
    expected = torch.nn.functional.group_norm(
        torch.nn.functional.batch_norm(
            x, torch_mean, torch_var, batch_weight, batch_bias, training=True, momentum=0.3
        ),
        3,
        weight,
        bias,
    )
    y, new_mean, new_var = reference.batch_channel_norm(
        x, 3, mean, var, batch_weight, batch_bias, weight, bias, True, 'batch', 0.3
    )
    assert_close(y, expected)
    assert_close(new_mean, torch_mean)
    assert_close(new_var, torch_var)


def test_outer_affine_is_per_group_or_per_channel():
    x, mean, var = rand(2, 6, 3), torch.zeros(6).double(), torch.ones(6).double()
    weight, bias = rand(3), rand(3)
    plain = reference.normalize(x, mean, var, 3)
    per_group = reference.normalize(x, mean, var, 3, weight=weight, bias=bias)
    for c in range(6):
        assert_close(per_group[:, c], plain[:, c] * weight[c // 2] + bias[c // 2])
    weight, bias = rand(6), rand(6)
    per_channel = reference.normalize(x, mean, var, 3, weight=weight, bias=bias)
    for c in range(6):
        assert_close(per_channel[:, c], plain[:, c] * weight[c] + bias[c])


def test_evaluation_keeps_and_uses_the_running_statistics():
    x, mean, var = rand(2, 4, 3), rand(4), rand(4).exp()
    for mode in ('estimate', 'batch'):
        y, same_mean, same_var = reference.batch_channel_norm(x, 2, mean, var, mode=mode)
        assert_close(y, reference.normalize(x, mean, var, 2))
        assert same_mean is mean and same_var is var


def test_samples_do_not_meet_in_evaluation():
    """The channel stage takes the statistics of the sample itself, also in evaluation."""
    x, mean, var = rand(4, 6, 3, 3), rand(6), rand(6).exp()
    together = reference.normalize(x, mean, var, 3)
    alone = torch.cat([reference.normalize(x[i : i + 1], mean, var, 3) for i in range(4)])
    assert_close(together, alone)


def test_estimates_converge_to_the_moments_of_a_constant_stream():
    """Seen around the old mean, the second moment ends at the variance once the mean is there."""
    x = rand(2, 3, 50) * torch.tensor([0.5, 1.0, 3.0]).view(1, 3, 1) + 7
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for _ in range(400):
        mean, var = reference.update_estimates(x, mean, var, 0.1)
    expected_mean, expected_var = reference.batch_statistics(x)
    assert_close(mean, expected_mean)
    assert_close(var, expected_var, atol=1e-10)


def test_bcn_rejects_an_unknown_mode():
    with pytest.raises(ValueError, match='unknown mode'):
        reference.batch_channel_norm(
            rand(1, 2, 3), 1, torch.zeros(2), torch.ones(2), training=True, mode='sync'
        )


def test_an_average_is_the_variance_of_all_inputs_by_hand():
    """[1, 3] and [5, 9]: the mean 4.5, the squares around it 12.25, 2.25, 0.25, 20.25."""
    mean, var = torch.tensor([100.0]).double(), torch.tensor([7.0]).double()
    for t, values in enumerate(([1.0, 3.0], [5.0, 9.0]), start=1):
        x = torch.tensor(values).double().view(1, 1, 2)
        mean, var = reference.update_estimates(x, mean, var, 1 / t, average=True)
    assert_close(mean, [4.5])
    assert_close(var, [8.75])
