"""The Triton kernels against the specification, `wsbcn_mm.reference`, in float64.

On a GPU they are compiled; without one Triton's interpreter runs them, on CPU tensors, and
`test_kernels_compile` shows that they can be compiled too. Inputs and statistics are off-centre,
cotangents random. Most tests cut x twice: as a GPU would want it, where one tile covers a row of a
small x, and into tiles of a few values, so that every loop has several turns and every row several
chunks.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from wsbcn_mm import reference
from wsbcn_mm.backends import triton as backend
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
TOLERANCE = {
    torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3
}  # fmt: skip
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
CUTS = {'as a GPU wants it': {}, 'small': dict(TILE=16, REDUCING=8, APPLYING=32)}


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


def make_input(shape, layout='contiguous', dtype=torch.float64):
    """An off-centre input whose channels differ."""
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = rand(*shape) * rand(*channel).exp() + 3 * rand(*channel) + 1
    x = x.to(dtype)
    return x if layout == 'contiguous' else x.to(memory_format=LAST[len(shape)])


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


def run(x, groups, buffers, parameters, grad, mode, momentum=0.3, rate=None, eps=1e-3):
    """Every operator of Batch-Channel Normalization: all results by name, and the buffers."""
    running_mean, running_var = (b.clone() for b in buffers)
    affine = [parameters[name] for name in PARAMETERS]
    if mode == 'batch':
        m, q = launch.row_moments(x)
        mean = m.mean(0)
        var = (q + (m - mean).square()).mean(0)
        y, *group = launch.normalize(x, m, q, mean, var, groups, *affine, eps)
    else:
        y, m, q, mean, var, *group = launch.normalize_with_estimates(
            x, groups, running_mean, running_var, *affine, mode == 'estimate', momentum, rate, eps
        )
    outer = next((p.numel() for p in affine[2:] if p is not None), 0)
    gradients = launch.normalize_backward(
        grad, x, m, q, mean, var, *group, *affine[:3], groups, outer, eps, mode == 'batch'
    )
    names = ('group_mean', 'inv_group_std', 'grad_x', *(f'grad_{name}' for name in PARAMETERS))
    return dict(
        y=y, m=m, q=q, mean=mean, var=var, running_mean=running_mean, running_var=running_var,
        **dict(zip(names, [*group, *gradients])),
    )  # fmt: skip


def spec(x, groups, buffers, parameters, grad, mode, momentum=0.3, rate=None, eps=1e-3):
    """The same in float64, from the specification."""
    x, grad = double(x).requires_grad_(), double(grad)
    parameters = {k: double(v) for k, v in parameters.items()}
    wanted = {'x': x} | {k: v.requires_grad_() for k, v in parameters.items() if v is not None}
    running = mean, var = [double(b) for b in buffers]
    if mode == 'estimate':
        running = mean, var = reference.update_estimates(x, mean, var, momentum)
    elif mode == 'batch':
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
        y=y, m=rows.mean(2), q=rows.var(2, unbiased=False), mean=mean, var=var,
        running_mean=running[0], running_var=running[1], group_mean=x1.mean(2),
        inv_group_std=(x1.var(2, unbiased=False) + eps).rsqrt(),
        **{f'grad_{name}': g for name, g in zip(wanted, found)},
    )  # fmt: skip
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
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape, groups', SHAPES)
def test_bcn_equals_reference(shape, groups, layout, mode, cut):
    if layout == 'channels_last' and len(shape) not in LAST:
        pytest.skip('no such layout')
    x, grad = make_input(shape, layout), rand(*shape)
    grad = grad.contiguous(memory_format=launch._format(x))
    check(x, groups, make_buffers(shape[1]), make_parameters(shape[1], groups), grad, mode)
