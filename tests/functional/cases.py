"""What the tests of the two functions share: inputs, and the two sides that are compared.

Losses are inner products with random cotangents: the sum of a normalised output is a constant, and
its gradient would be zero whatever the code does. Inputs are off-centre, and so are the running
statistics, because zero means hide wrong ones.
"""

import math

import torch

from wsbcn_mm import batch_channel_norm, reference

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


def exact(values):
    """The same numbers in float64: tensors, and dicts and tuples of them."""
    if isinstance(values, dict):
        return {k: exact(v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(map(exact, values))
    return None if values is None else values.double()


def expected_gradients(x, parameters, grad_y, groups, mean, var, **settings):
    """`gradients` of the specification, in float64 whatever the dtype of the arguments."""
    tensors = exact((x, parameters, grad_y))
    return gradients(spec, *tensors, groups, *exact((mean, var)), **settings)


# Of the largest value of each tensor. float64 leaves five digits of room, half precision a few
# roundings. float32, in which half precision is computed, too: where a group is constant (expanded,
# one position), gradients have the factor eps**-1.5 = 3e4 (eps 1e-3) before its roundings of 6e-8.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-3,
    torch.float16: 4 * torch.finfo(torch.float16).eps,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}


def assert_equal(actual, expected, tolerance=1e-10):
    """Each tensor, relative to its largest value."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert actual[name].shape == expected[name].shape, name
        error = (actual[name].double() - expected[name]).abs().max()
        scale = expected[name].abs().max().clamp(min=1)
        assert error <= tolerance * scale, f'{name}: {error:.1e} at scale {scale:.1e}'


def oracle_error(outputs, oracle):
    return {k: (outputs[k].double() - oracle[k]).abs().max() for k in oracle}


def assert_at_most_twice(ours, theirs, oracle, summed):
    """Of the largest errors; plain torch may happen to hit the numbers.

    What is computed in float32 and rounded to 16 bits may then be off by one rounding of the
    largest value. What stays in float32 may by what the roundings of a sum of ``summed`` values,
    which go either way, come to.
    """
    ours_off, theirs_off = oracle_error(ours, oracle), oracle_error(theirs, oracle)
    for name, exact in oracle.items():
        dtype = ours[name].dtype
        roundings = math.sqrt(summed) if dtype == torch.float32 else 1
        floor = roundings * torch.finfo(dtype).eps * exact.abs().max()
        assert ours_off[name] <= max(2 * theirs_off[name], floor), name


def of_far_rows(formula):
    """Rows whose deviation is a thirty-thousandth of their mean, and what is specified."""
    weight = (100 + 0.003 * rand(6, 64)).float()
    g = rand(6, 64)
    exact_weight = weight.double().requires_grad_()
    w_hat = reference.weight_standardize(exact_weight, 1e-8, formula)
    (grad,) = torch.autograd.grad(w_hat, exact_weight, g)
    return dict(weight=weight, g=g.float(), w_hat=w_hat.detach(), grad=grad)
