"""`weight_standardize` and `batch_channel_norm` against the specification, `wsbcn_mm.reference`.

Losses are inner products with random cotangents: the sum of a normalised output is a constant, and
its gradient would be zero whatever the code does. Inputs are off-centre, and so are the running
statistics, because zero means hide wrong ones.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from wsbcn_mm import batch_channel_norm, reference, weight_standardize

pytestmark = pytest.mark.usefixtures('backend')  # every test, on every backend

FORMULAS = ('paper', 'std_eps', 'var_eps')
MODES = ('estimate', 'batch')
AFFINES = ('group', 'channel', None)
# (shape, num_groups); odd sizes, one sample, one position, no positions axis at all.
SHAPES = [
    ((1, 8, 5, 6), 4),
    ((3, 12, 7, 1), 3),
    ((2, 6, 4, 4, 3), 2),
    ((4, 8), 4),
    ((1, 8, 1, 1), 4),
    ((5, 9, 7), 3),
    ((2, 5, 3, 3), 1),  # one group: LayerNorm as the second stage
    ((2, 5, 3, 3), 5),  # a group per channel: InstanceNorm as the second stage
]
LAYOUTS = ('contiguous', 'channels_last', 'sliced', 'transposed', 'expanded')
PARAMETERS = ('batch_weight', 'batch_bias', 'weight', 'bias')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def make_input(shape, layout='contiguous', dtype=torch.float64):
    """An off-centre input whose channels differ, or None where the layout does not exist."""
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = rand(*shape) * (rand(*channel).exp()) + 3 * rand(*channel) + 1
    x = x.to(dtype)
    if layout == 'channels_last':
        if len(shape) < 4:
            return None
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.to(memory_format=formats[len(shape)])
    elif layout == 'sliced':  # every second channel and position of a larger tensor
        larger = torch.full([2 * s for s in shape], torch.nan, dtype=dtype)
        view = larger[tuple(slice(None, None, 2) for _ in shape)]
        x = view.copy_(x)
    elif layout == 'transposed':
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == 'expanded':
        x = x[..., :1].expand(shape) if len(shape) > 2 else x[:1].expand(shape)
    return x


def make_parameters(num_channels, num_groups, affine='group', dtype=torch.float64):
    outer = {'group': num_groups, 'channel': num_channels, None: None}[affine]
    return dict(
        batch_weight=rand(num_channels, dtype=dtype) + 1,
        batch_bias=rand(num_channels, dtype=dtype),
        weight=None if outer is None else rand(outer, dtype=dtype) + 1,
        bias=None if outer is None else rand(outer, dtype=dtype),
    )


def make_buffers(num_channels, dtype=torch.float64):
    return 1 + rand(num_channels, dtype=dtype), rand(num_channels).exp().to(dtype)


def clone(values):
    return {k: None if v is None else v.clone() for k, v in values.items()}


def fast(x, groups, mean, var, parameters, **settings):
    """`batch_channel_norm` in the signature of the reference: returns the buffers as well."""
    mean, var = mean.clone(), var.clone()
    y = batch_channel_norm(x, groups, mean, var, **parameters, **settings)
    return y, mean, var


def spec(x, groups, mean, var, parameters, **settings):
    return reference.batch_channel_norm(x, groups, mean, var, **parameters, **settings)


def gradients(run, x, parameters, grad_y, *args, **settings):
    """Output, buffers, and the gradient of everything that has one."""
    x = x.detach().requires_grad_()
    parameters = {
        k: None if v is None else v.detach().requires_grad_() for k, v in parameters.items()
    }
    y, mean, var = run(x, *args, parameters, **settings)
    wanted = {'x': x} | {k: v for k, v in parameters.items() if v is not None}
    found = torch.autograd.grad(y, list(wanted.values()), grad_y)
    return {
        'y': y.detach(),
        'running_mean': mean,
        'running_var': var,
        **{f'grad_{k}': g for k, g in zip(wanted, found, strict=True)},
    }


def assert_equal(actual, expected, tolerance=1e-10):
    """Relative to the largest value of each tensor; float64 leaves five digits of room."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        error = (actual[name] - expected[name]).abs().max()
        scale = expected[name].abs().max().clamp(min=1)
        assert error <= tolerance * scale, f'{name}: {error:.1e} at scale {scale:.1e}'


# ----------------------------------------------------------------------------------------------
# Batch-Channel Normalization equals the specification


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('affine', AFFINES)
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('mode', MODES)
def test_bcn_equals_reference(mode, training, affine, layout):
    tested = 0
    for shape, groups in SHAPES:
        x = make_input(shape, layout)
        one_value_per_channel = x is not None and x.numel() == x.size(1)
        if x is None or (mode == 'batch' and training and one_value_per_channel):
            continue  # no such layout; no such statistics (see test_one_value_per_channel)
        parameters = make_parameters(shape[1], groups, affine)
        args = groups, *make_buffers(shape[1])
        settings = dict(training=training, mode=mode, momentum=0.3, eps=1e-3)
        grad_y = make_input(shape, layout)
        expected = gradients(spec, x, parameters, grad_y, *args, **settings)
        actual = gradients(fast, x, parameters, grad_y, *args, **settings)
        assert_equal(actual, expected)
        with torch.no_grad():  # another way through a backend: nothing is kept for a gradient
            values = dict(
                zip(
                    ('y', 'running_mean', 'running_var'),
                    fast(x, *args, parameters, **settings),
                    strict=True,
                )
            )
        assert_equal(values, {name: expected[name] for name in values})
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
def test_every_parameter_may_be_given_alone(given):
    x, (mean, var) = make_input((2, 8, 3, 5)), make_buffers(8)
    parameters = {k: v if k == given else None for k, v in make_parameters(8, 4).items()}
    for mode in MODES:
        settings = dict(training=True, mode=mode)
        grad_y = rand(*x.shape)
        expected = gradients(spec, x, parameters, grad_y, 4, mean, var, **settings)
        assert f'grad_{given}' in expected
        assert_equal(gradients(fast, x, parameters, grad_y, 4, mean, var, **settings), expected)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('frozen', [('x',), PARAMETERS, ('batch_weight', 'bias')])
def test_frozen_inputs_get_no_gradient_and_the_others_keep_theirs(mode, frozen):
    x, parameters, buffers = make_input((2, 8, 3, 5)), make_parameters(8, 4), make_buffers(8)
    grad_y, settings = rand(*x.shape), dict(training=True, mode=mode)
    expected = gradients(spec, x, parameters, grad_y, 4, *buffers, **settings)
    values = {'x': x} | parameters
    values = {k: v.clone().requires_grad_(k not in frozen) for k, v in values.items()}
    x = values.pop('x')
    fast(x, 4, *buffers, values, **settings)[0].backward(grad_y)
    for name, value in ({'x': x} | values).items():
        if name in frozen:
            assert value.grad is None
        else:
            assert_equal({name: value.grad}, {name: expected[f'grad_{name}']})


@pytest.mark.parametrize('given', [('group', 'channel'), ('channel', 'group')])
def test_outer_weight_and_bias_may_differ_in_shape(given):
    """One per group, the other per channel."""
    sizes = [{'group': 2, 'channel': 6}[kind] for kind in given]
    args = make_input((2, 6, 4, 3)), make_parameters(6, 2), rand(2, 6, 4, 3), 2, *make_buffers(6)
    args[1].update(weight=rand(sizes[0]) + 1, bias=rand(sizes[1]))
    settings = dict(training=True, momentum=0.3)
    assert_equal(gradients(fast, *args, **settings), gradients(spec, *args, **settings))


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


# ----------------------------------------------------------------------------------------------
# Numeric gradients and second derivatives


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


# ----------------------------------------------------------------------------------------------
# Precision and dtypes


def oracle_error(outputs, oracle):
    return {k: (outputs[k].double() - oracle[k]).abs().max() for k in oracle}


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('training, mode', [(True, 'batch'), (True, 'estimate'), (False, 'batch')])
def test_bcn_errs_at_most_twice_as_much_as_plain_torch(training, mode, dtype):
    shape, groups = (2, 16, 13, 11), 4
    x, grad_y = make_input(shape, dtype=dtype), rand(*shape, dtype=dtype)
    parameters = make_parameters(16, groups, 'channel', dtype)
    buffers = make_buffers(16, dtype)
    settings = dict(training=training, mode=mode, momentum=0.25)

    def plain(x, groups, mean, var, parameters, **_):
        """F.batch_norm, then F.group_norm, with the statistics that the mode asks for."""
        new = spec(x.double(), groups, mean.double(), var.double(), {}, **settings)[1:]
        if mode == 'estimate' and training:
            mean, var = (t.to(dtype) for t in new)
        inner = parameters['batch_weight'], parameters['batch_bias']
        outer = parameters['weight'], parameters['bias']
        use_batch = training and mode == 'batch'
        x1 = F.batch_norm(x, mean.clone(), var.clone(), *inner, training=use_batch)
        return F.group_norm(x1, groups, *outer), *new

    oracle = gradients(
        spec,
        x.double(),
        {k: v.double() for k, v in parameters.items()},
        grad_y.double(),
        groups,
        *[b.double() for b in buffers],
        **settings,
    )
    ours = gradients(fast, x, parameters, grad_y, groups, *buffers, **settings)
    theirs = gradients(plain, x, parameters, grad_y, groups, *buffers)
    assert all(v.dtype == dtype for v in ours.values())  # gradients and buffers included
    ours, theirs = oracle_error(ours, oracle), oracle_error(theirs, oracle)
    for name in oracle:
        # Where plain torch happens to hit the number: one rounding of the largest value.
        floor = torch.finfo(dtype).eps * oracle[name].abs().max()
        assert ours[name] <= max(2 * theirs[name], floor), name


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
    ours, theirs = oracle_error(ours, oracle), oracle_error(theirs, oracle)
    for name in oracle:
        assert ours[name] <= 2 * theirs[name], name


@pytest.mark.parametrize('layout', ['contiguous', 'channels_last'])
@pytest.mark.parametrize('training, mode', [(True, 'batch'), (True, 'estimate'), (False, 'batch')])
def test_bcn_stays_accurate_in_float32_at_mean_1000(training, mode, layout):
    """E[x^2] - E[x]^2 would be wrong by a quarter here; centred sums keep four digits."""
    shape = (2, 8, 12, 10)
    x = 1000 + rand(*shape, dtype=torch.float32)
    if layout == 'channels_last':
        x = x.to(memory_format=torch.channels_last)
    buffers = torch.full((8,), 1000.1), torch.full((8,), 0.9)
    grad_y, parameters = rand(*shape, dtype=torch.float32), make_parameters(8, 4, dtype=x.dtype)
    settings = dict(training=training, mode=mode)
    oracle = gradients(
        spec,
        x.double(),
        {k: v.double() for k, v in parameters.items()},
        grad_y.double(),
        4,
        *[b.double() for b in buffers],
        **settings,
    )
    actual = gradients(fast, x, parameters, grad_y, 4, *buffers, **settings)
    assert_equal({k: v.double() for k, v in actual.items()}, oracle, 1e-3)


@pytest.mark.parametrize('formula', FORMULAS)
def test_ws_stays_accurate_in_float32_at_mean_1000(formula):
    weight = 1000 + rand(8, 16, 3, 3, dtype=torch.float32)
    expected = reference.weight_standardize(weight.double(), 1e-5, formula)
    actual = weight_standardize(weight, 1e-5, formula)
    assert (actual - expected).abs().max() < 1e-3


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_autocast_does_not_change_the_dtype(dtype):
    x = make_input((2, 8, 5, 5), dtype=dtype)
    parameters = make_parameters(8, 4, dtype=torch.float32)
    buffers, grad_y = make_buffers(8, torch.float32), rand(2, 8, 5, 5, dtype=dtype)
    settings = dict(training=True)
    expected = gradients(fast, x, parameters, grad_y, 4, *buffers, **settings)
    with torch.autocast('cpu', torch.bfloat16):
        actual = gradients(fast, x, parameters, grad_y, 4, *buffers, **settings)
        w_hat = weight_standardize(parameters['weight'].view(1, -1))
    assert actual['y'].dtype == actual['grad_x'].dtype == dtype
    assert w_hat.dtype == torch.float32
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), name  # computed in float32 inside, too


def test_gradients_have_the_dtype_of_what_they_belong_to():
    x = make_input((2, 8, 5), dtype=torch.bfloat16)
    parameters = make_parameters(8, 4, dtype=torch.float32)
    buffers, grad_y = make_buffers(8, torch.float32), rand(2, 8, 5, dtype=torch.bfloat16)
    found = gradients(fast, x, parameters, grad_y, 4, *buffers, training=True)
    assert found['y'].dtype == found['grad_x'].dtype == torch.bfloat16
    assert found['running_mean'].dtype == found['running_var'].dtype == torch.float32
    for name in PARAMETERS:
        assert found[f'grad_{name}'].dtype == torch.float32
    # Parameters and buffers in float32 are used as they are, not rounded to bfloat16 first.
    oracle = gradients(
        spec,
        x.double(),
        {k: v.double() for k, v in parameters.items()},
        grad_y.double(),
        4,
        *[b.double() for b in buffers],
        training=True,
    )
    for name in ('running_mean', 'running_var', 'grad_batch_weight', 'grad_weight'):
        torch.testing.assert_close(found[name].double(), oracle[name], rtol=1e-4, atol=1e-4)


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
def test_one_value_per_channel(shape):
    """Image pooling with one image: BatchNorm raises, batch mode falls back on its estimates."""
    x, parameters, (mean, var) = make_input(shape), make_parameters(8, 4), make_buffers(8)
    grad_y = rand(*shape)
    frozen = gradients(spec, x, parameters, grad_y, 4, mean, var)
    batch = gradients(fast, x, parameters, grad_y, 4, mean, var, training=True, mode='batch')
    assert_equal(batch, frozen)
    assert torch.equal(batch['running_mean'], mean) and torch.equal(batch['running_var'], var)
    # Estimate mode needs no second value: around the old mean there is a second moment.
    settings = dict(training=True, mode='estimate', momentum=0.3)
    estimate = gradients(fast, x, parameters, grad_y, 4, mean, var, **settings)
    assert_equal(estimate, gradients(spec, x, parameters, grad_y, 4, mean, var, **settings))
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


# ----------------------------------------------------------------------------------------------
# Memory: formats, views, what is saved for backward


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


# ----------------------------------------------------------------------------------------------
# Weight Standardization equals the specification

WEIGHTS = [(6, 4, 3, 3), (5, 7, 1, 1), (4, 1, 2), (3, 2, 2, 2, 2), (7, 9), (1, 2, 1, 1)]


@pytest.mark.parametrize('eps', [1e-5, 1e-2])
@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('shape', WEIGHTS)
def test_ws_equals_reference(shape, formula, eps):
    for layout in ('contiguous', 'channels_last', 'sliced', 'transposed'):
        weight = make_input(shape, layout)
        if weight is None:
            continue
        weight, g, h = weight.detach().requires_grad_(), rand(*shape), rand(*shape)

        def run(standardize, weight=weight, g=g, h=h):
            w_hat = standardize(weight, eps, formula)
            assert w_hat.shape == weight.shape
            (grad,) = torch.autograd.grad(w_hat, weight, g, create_graph=True)
            (second,) = torch.autograd.grad(grad, weight, h)
            return {'w_hat': w_hat, 'grad': grad, 'second': second}

        assert_equal(run(weight_standardize), run(reference.weight_standardize), 1e-9)


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


# ----------------------------------------------------------------------------------------------
# Errors name the argument, what was expected and what came

X = torch.zeros(2, 8, 3, 3)
MEAN, VAR = torch.zeros(8), torch.ones(8)


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(input=torch.zeros(2, 8, dtype=torch.long)),
            TypeError,
            r'input must be a floating-point tensor\n  got torch.int64',
        ),
        (dict(input=torch.zeros(2, 8, dtype=torch.complex64)), TypeError, 'input must be'),
        (dict(input=[1.0]), TypeError, r'input must be a floating-point tensor\n  got list'),
        (dict(input=torch.zeros(8)), ValueError, r'input must have at least 2 axes.*\n.*\(8,\)'),
        (
            dict(num_groups=3),
            ValueError,
            r'num_channels must be divisible by num_groups\n'
            r'  got num_channels=8, num_groups=3\n  for 8 channels num_groups=[24] would fit',
        ),
        (dict(num_groups=32), ValueError, 'num_groups=8 would fit'),
        (dict(num_groups=0), ValueError, 'num_groups must be at least 1'),
        (dict(num_groups=-4), ValueError, r'num_groups must be at least 1\n  got -4'),
        (dict(num_groups=4.0), TypeError, 'num_groups must be an int'),
        (dict(num_groups=True), TypeError, 'num_groups must be an int'),
        (dict(running_mean=torch.zeros(4)), ValueError, r'running_mean must have shape \(8,\)'),
        (dict(running_var=torch.zeros(1, 8)), ValueError, r'running_var must have shape \(8,\)'),
        (dict(batch_weight=torch.ones(4)), ValueError, r'batch_weight must have shape \(8,\)'),
        (dict(batch_bias=torch.ones(())), ValueError, r'batch_bias must have shape \(8,\)'),
        (
            dict(weight=torch.ones(2)),
            ValueError,
            r'^weight must have shape \(4,\).* or \(8,\).*\n  got \(2,\)',
        ),
        (dict(bias=torch.ones(1, 4, 1)), ValueError, r'^bias must have shape \(4,\)'),
        (dict(mode='sync'), ValueError, r"mode must be one of 'estimate', 'batch'\n  got 'sync'"),
        (dict(mode=None), ValueError, 'mode must be one of'),
        (dict(momentum=1.5), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum=-0.1), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum=float('nan')), ValueError, r'momentum must lie in \[0, 1\]'),
        (dict(momentum='0.1'), TypeError, r'momentum must be a number in \[0, 1\]'),
        (dict(momentum=True), TypeError, r'momentum must be a number in \[0, 1\]'),
        (dict(momentum=None), TypeError, r'momentum must be a number in \[0, 1\]'),
        (dict(eps=True), TypeError, r'eps must be a number >= 0\n  got True of type bool'),
        (dict(eps='1e-5'), TypeError, 'eps must be a number >= 0'),
        (dict(eps=-1e-5), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('nan')), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('inf')), ValueError, 'eps must be finite and >= 0'),
    ],
)
@pytest.mark.parametrize('training', [True, False])
def test_bcn_errors(change, error, message, training):
    arguments = dict(
        input=X,
        num_groups=4,
        running_mean=MEAN.clone(),
        running_var=VAR.clone(),
        training=training,
    )
    batch_channel_norm(**arguments)
    buffers = arguments['running_mean'].clone(), arguments['running_var'].clone()
    with pytest.raises(error, match=message):
        batch_channel_norm(**arguments | change)
    # A rejected call leaves no trace.
    assert torch.equal(arguments['running_mean'], buffers[0])
    assert torch.equal(arguments['running_var'], buffers[1])


@pytest.mark.parametrize(
    'change, error, message',
    [
        (
            dict(weight=torch.ones(4, 4, dtype=torch.int)),
            TypeError,
            r'weight must be a floating-point tensor\n  got torch.int32',
        ),
        (dict(weight=None), TypeError, r'weight must be a floating-point tensor\n  got NoneType'),
        (dict(weight=torch.ones(4)), ValueError, 'weight must have at least 2 axes'),
        (dict(weight=torch.ones(8, 1, 1, 1)), ValueError, r'at least 2 weights.*\n.*got 1'),
        (dict(weight=torch.ones(8, 0, 3, 3)), ValueError, r'at least 2 weights.*\n.*got 0'),
        (
            dict(formula='std'),
            ValueError,
            r"formula must be one of 'paper', 'std_eps', 'var_eps'\n  got 'std'",
        ),
        (dict(eps=True), TypeError, 'eps must be a number >= 0'),
        (dict(eps='small'), TypeError, 'eps must be a number >= 0'),
        (dict(eps=None), TypeError, 'eps must be a number >= 0'),
        (dict(eps=-1.0), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('nan')), ValueError, 'eps must be finite and >= 0'),
        (dict(eps=float('inf')), ValueError, 'eps must be finite and >= 0'),
    ],
)
def test_ws_errors(change, error, message):
    arguments = dict(weight=torch.ones(4, 2, 3, 3))
    weight_standardize(**arguments)
    with pytest.raises(error, match=message):
        weight_standardize(**arguments | change)
