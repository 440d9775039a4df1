"""Properties over random shapes, dtypes, layouts, groups, modes, rates (hypothesis).

Deterministic: the same examples in every run.
"""

import pytest

pytest.importorskip('hypothesis', reason='draws the examples')

import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from wsbcn_mm import backends, batch_channel_norm, reference, weight_standardize
from wsbcn_mm.checks import FORMULAS, MODES

BACKENDS = [name for name in ('cpu', 'eager') if backends.BACKENDS[name].unavailable() is None]
PARAMETERS = ('batch_weight', 'batch_bias', 'weight', 'bias')


def examples(count):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def cases(draw, dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16)):
    """Arguments of batch_channel_norm, and a cotangent."""
    groups, per_group = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    channels = groups * per_group
    positions = draw(st.lists(st.integers(1, 9), min_size=0, max_size=3))
    shape = (draw(st.integers(1, 4)), channels, *positions)
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*size):
        return torch.randn(size, generator=g, dtype=torch.float64)

    offset, scale = draw(st.sampled_from([0.0, 3.0, -20.0])), draw(st.sampled_from([0.1, 1.0, 5.0]))
    of_channels = random(channels).view(-1, *[1] * len(positions)) + offset
    x = (random(*shape) * scale + of_channels).to(dtype)
    layout = draw(st.sampled_from(['rows', 'channels_last', 'transposed', 'strided']))
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if layout == 'channels_last' and last is not None:
        x = x.contiguous(memory_format=last)
    elif layout == 'transposed' and x.dim() > 3:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    elif layout == 'strided':
        x = torch.stack([x, x], -1)[..., 0]
    statistics = torch.float64 if dtype is torch.float64 else torch.float32
    outer = draw(st.sampled_from([groups, channels]))
    sizes = dict(zip(PARAMETERS, (channels, channels, outer, outer)))
    parameters = {
        name: random(size).to(statistics) if draw(st.booleans()) else None
        for name, size in sizes.items()
    }
    return dict(
        x=x,
        num_groups=groups,
        mean=(random(channels) + offset).to(statistics),
        var=(random(channels).square() + 0.1).to(statistics),
        parameters=parameters,
        mode=draw(st.sampled_from(MODES)),
        training=draw(st.booleans()),
        momentum=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        grad=random(*shape).to(dtype),
    )


def run(case, function, dtype=None):
    """Result, gradients of everything, new statistics; in float64 where it is the reference."""
    convert = (lambda t: t.double()) if dtype is torch.float64 else (lambda t: t.clone())
    x = convert(case['x'].detach()) if dtype is torch.float64 else case['x'].detach()
    x = x.requires_grad_()
    parameters = {
        k: None if v is None else convert(v).requires_grad_() for k, v in case['parameters'].items()
    }
    mean, var = convert(case['mean']), convert(case['var'])
    arguments = dict(
        training=case['training'], mode=case['mode'], momentum=case['momentum'], eps=case['eps']
    )
    y = function(x, case['num_groups'], mean, var, **parameters, **arguments)
    if isinstance(y, tuple):
        y, mean, var = y
    wanted = {'x': x} | {k: v for k, v in parameters.items() if v is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), case['grad'].to(y.dtype))
    return dict(y=y.detach(), mean=mean, var=var) | dict(zip(wanted, gradients))


@pytest.mark.parametrize('name', BACKENDS)
@examples(150)
@given(case=cases())
def test_every_backend_is_the_reference(name, case):
    """Result, statistics and all gradients, relative to the size of each."""
    x = case['x']
    # A single value per channel: batch mode then uses the running statistics, which the
    # specification, that of the equations, does not say.
    assume(not (case['training'] and case['mode'] == 'batch' and x.numel() == x.size(1)))
    expected = run(case, reference.batch_channel_norm, torch.float64)
    with backends.use_backend(name):
        found = run(case, batch_channel_norm)
    precision = {torch.float64: 1e-9, torch.float32: 3e-4, torch.float16: 2e-2}
    tolerance = precision.get(x.dtype, 0.1)
    # Groups that are nearly constant amplify rounding by 1 / sqrt(eps).
    with torch.no_grad():
        deviation = x.double().reshape(x.size(0), case['num_groups'], -1).std(2, correction=0).min()
    assume(x.dtype is torch.float64 or deviation > 0.05)
    # Two values normalise to -1 and 1 whatever they are: their gradient is a difference of nearly
    # equal numbers, all rounding but in float64.
    assume(x.dtype is torch.float64 or x[0].numel() // case['num_groups'] > 2)
    assert found['y'].dtype is x.dtype
    for key, value in expected.items():
        other = found[key].double()
        scale = value.abs().max().clamp_min(1e-3)
        kind = 1e-5 if key in ('mean', 'var') and x.dtype is not torch.float64 else tolerance
        if key == 'x' or key in PARAMETERS:
            kind *= 5
        assert ((other - value).abs() <= kind * scale).all(), (key, (other - value).abs().max())


@examples(40)
@given(case=cases([torch.float64]), seed=st.integers(0, 99))
def test_a_groups_scale_and_shift_do_not_matter(case, seed):
    """An affine of x per sample and group: the group stage takes it out, for eps to 0.

    Exactly so where the channel stage treats the channels of a group alike.
    """
    x, groups = case['x'], case['num_groups']
    assume(x[0, 0].numel() * (x.size(1) // groups) > 1)
    g = torch.Generator().manual_seed(seed)
    scale = torch.rand(x.size(0), groups, generator=g, dtype=x.dtype) * 4 + 0.5
    shift = torch.randn(x.size(0), groups, generator=g, dtype=x.dtype) * 5
    shape = (x.size(0), x.size(1), *[1] * (x.dim() - 2))

    def expand(values):
        return values.repeat_interleave(x.size(1) // groups, 1).view(shape)

    mean = case['mean'][:groups].repeat_interleave(x.size(1) // groups)
    var = case['var'][:groups].repeat_interleave(x.size(1) // groups)
    weight, bias = case['parameters']['weight'], case['parameters']['bias']
    results = [
        batch_channel_norm(i, groups, mean, var, weight=weight, bias=bias, eps=1e-14)
        for i in (x, x * expand(scale) + expand(shift))
    ]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@examples(25)
@given(case=cases([torch.float64]))
def test_no_update_at_rate_0_and_no_memory_at_rate_1(case):
    x, mean, var = case['x'], case['mean'].clone(), case['var'].clone()
    groups = case['num_groups']
    batch_channel_norm(x, groups, mean, var, training=True, momentum=0.0)
    assert torch.equal(mean, case['mean'])
    assert torch.equal(var, case['var'])
    batch_channel_norm(x, groups, mean, var, training=True, momentum=1.0)
    own, _ = reference.batch_statistics(x)
    torch.testing.assert_close(mean, own)


@examples(25)
@given(case=cases([torch.float64]), ranks=st.integers(2, 4), momentum=st.sampled_from([0.01, 0.5]))
def test_the_mean_of_updates_is_the_update_with_all_images(case, ranks, momentum):
    """What synchronises the estimates: shares of any size, weighted with their number of images."""
    x = torch.cat([case['x']] * 2)[torch.arange(2 * len(case['x'])) % 3 != 1]
    start = case['mean'], case['var']
    expected = reference.update_estimates(x, *start, momentum)
    shares = [part for part in x.tensor_split(ranks) if len(part)]
    updates = [reference.update_estimates(part, *start, momentum) for part in shares]
    for i in (0, 1):
        found = sum(len(part) * update[i] for part, update in zip(shares, updates)) / len(x)
        torch.testing.assert_close(found, expected[i], rtol=1e-12, atol=1e-12)


@st.composite
def weights(draw):
    shape = [draw(st.integers(low, high)) for low, high in ((1, 6), (2, 9), (1, 3), (1, 3))]
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.randn(shape, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.02, 1.0]))


@pytest.mark.parametrize('name', BACKENDS)
@examples(40)
@given(
    weight=weights(),
    formula=st.sampled_from(FORMULAS),
    scale=st.floats(0.3, 30),
    seed=st.integers(0, 99),
)
def test_weight_standardization(name, weight, formula, scale, seed):
    """Equal to the specification; blind to shift and positive scale of a filter; sum of dL/dw 0."""
    weight = weight.requires_grad_()
    g = torch.Generator().manual_seed(seed)
    grad = torch.randn(weight.shape, generator=g, dtype=torch.float64)
    shift = torch.randn(len(weight), 1, 1, 1, generator=g, dtype=torch.float64)
    expected = reference.weight_standardize(weight, 1e-5, formula)
    (wanted,) = torch.autograd.grad(expected, weight, grad)
    with backends.use_backend(name):
        found = weight_standardize(weight, 1e-5, formula)
        (gradient,) = torch.autograd.grad(found, weight, grad)
        moved = [
            weight_standardize(w.detach(), 1e-18, formula) for w in (weight, scale * weight + shift)
        ]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    size = wanted.abs().max().clamp_min(1)
    torch.testing.assert_close(gradient / size, wanted / size, rtol=1e-9, atol=1e-9)
    assert (gradient.flatten(1).sum(1).abs() <= 1e-9 * size).all()
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-6)


def test_the_examples_reach_what_they_are_for():
    """Every dtype, mode and layout is among the examples."""
    seen = set()

    @examples(100)
    @given(case=cases())
    def look(case):
        x = case['x']
        seen.update([x.dtype, case['mode'], x.dim(), ('contiguous', x.is_contiguous())])
        seen.add(('training', case['training']))

    look()
    assert seen >= {torch.float64, torch.float32, torch.bfloat16, torch.float16, *MODES, 2, 3, 4, 5}
    assert seen >= {('contiguous', True), ('contiguous', False), ('training', True)}
