"""What the tests of the Triton kernels share: inputs, all operators in one call, the specification.

Everything is judged against `wsbcn_mm.reference` in float64, gradients and buffers included. Inputs
and statistics are off-centre, cotangents random.
"""

from importlib.util import find_spec

import pytest
import torch

from wsbcn_mm import reference
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.backends.ops import accumulation_dtype

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def import_launch():
    """`launch`, and with it Triton, which decides at its import whether it interprets."""
    if find_spec('triton') is None:
        pytest.skip('triton is not installed', allow_module_level=True)
    with pytest.MonkeyPatch.context() as patch:  # processes that other tests start must not see it
        if DEVICE == 'cpu':
            patch.setenv('TRITON_INTERPRET', '1')
        from triton import JITFunction, language

        if DEVICE == 'cpu' and isinstance(language.sum, JITFunction):
            reason = 'triton was imported before it could be told to interpret: run this file alone'
            pytest.skip(reason, allow_module_level=True)
        from tests.backends.triton import interpreter
        from wsbcn_mm.backends.triton import launch

        interpreter.patch_once_per_launch()
    return launch


launch = import_launch()

FORMULAS = ('paper', 'std_eps', 'var_eps')
MODES = ('estimate', 'evaluate', 'batch')
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative to the largest value of a tensor. Half precision rounds y and dx, nothing else.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYOUTS = ('contiguous', 'channels_last')


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(DEVICE, dtype)


def in_layout(x, layout):
    return x if layout == 'contiguous' else x.contiguous(memory_format=LAST[x.dim()])


def make_input(shape, layout='contiguous', dtype=torch.float64):
    """An off-centre input whose channels differ."""
    channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = rand(*shape) * rand(*channel).exp() + 3 * rand(*channel) + 1
    return in_layout(x.to(dtype), layout)


def make_affine(channels, outer, dtype=torch.float64):
    """`outer`: size of the outer affine, 0 for none."""
    return Affine(
        batch_weight=rand(channels, dtype=dtype) + 1,
        batch_bias=rand(channels, dtype=dtype),
        weight=rand(outer, dtype=dtype) + 1 if outer else None,
        bias=rand(outer, dtype=dtype) if outer else None,
    )


def make_running(channels, dtype=torch.float64):
    counts = torch.zeros(2, channels, dtype=torch.int64, device=DEVICE)
    tracked = torch.tensor(7, device=DEVICE)
    return Running(1 + rand(channels, dtype=dtype), rand(channels).exp().to(dtype), counts, tracked)


def double(value):
    return None if value is None else value.detach().double()


def run(x, groups, running, affine, grad, mode, rate=0.3, eps=1e-3):
    """Every operator of Batch-Channel Normalization: all results by name, and the buffers."""
    running = Running(*(None if value is None else value.clone() for value in running))
    tracked = running.num_batches_tracked
    if mode == 'batch':
        y, statistics = launch.normalize_with_batch(x, groups, running, affine, rate, eps)
    else:
        used_rate = rate if mode == 'estimate' else None
        y, statistics = launch.normalize_with_estimates(x, groups, running, affine, used_rate, eps)
    grad_x, gradients = launch.normalize_backward(
        grad, x, groups, statistics, affine, eps, mode == 'batch'
    )
    return dict(
        y=y,
        **statistics._asdict(),
        running_mean=running.mean,
        running_var=running.var,
        **({} if tracked is None else {'num_batches_tracked': tracked}),
        grad_x=grad_x,
        **{f'grad_{name}': value for name, value in gradients._asdict().items()},
    )


def spec(x, groups, running, affine, grad, mode, rate=0.3, eps=1e-3):
    """The same in float64, from the specification."""
    x, grad = double(x).requires_grad_(), double(grad)
    parameters = {name: double(value) for name, value in affine._asdict().items()}
    wanted = {'x': x} | {k: v.requires_grad_() for k, v in parameters.items() if v is not None}
    buffers = mean, var = double(running.mean), double(running.var)
    if mode == 'estimate':
        buffers = mean, var = reference.update_estimates(x, mean, var, rate)
    elif mode == 'batch':
        _, *buffers = reference.batch_channel_norm(
            x, groups, mean, var, training=True, mode='batch', momentum=rate
        )
        mean, var = reference.batch_statistics(x)
    y = reference.normalize(x, mean, var, groups, **parameters, eps=eps)
    gradients = torch.autograd.grad(y, list(wanted.values()), grad)

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
        running_mean=buffers[0],
        running_var=buffers[1],
        group_mean=x1.mean(2),
        inv_group_std=(x1.var(2, unbiased=False) + eps).rsqrt(),
        **{f'grad_{name}': gradient for name, gradient in zip(wanted, gradients)},
    )
    return {name: value.detach() for name, value in results.items()}


def assert_close(actual, expected, dtype, name):
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).abs().max()
    scale = expected.abs().max().clamp(min=1)
    assert error <= TOLERANCE[dtype] * scale, f'{name}: {error:.1e} at scale {scale:.1e}'


def check(x, groups, running, affine, grad, mode, **settings):
    """Everything that `run` returns has the value of `spec`, its dtype and its layout."""
    actual = run(x, groups, running, affine, grad, mode, **settings)
    expected = spec(x, groups, running, affine, grad, mode, **settings)
    if running.num_batches_tracked is not None:
        counted = running.num_batches_tracked + (mode != 'evaluate')
        assert actual['num_batches_tracked'] == counted
    for name, value in expected.items():
        if name in ('y', 'grad_x'):
            dtype = x.dtype
            assert actual[name].stride() == x.stride(), name
        elif name.startswith('running'):
            dtype = running.mean.dtype
        else:
            dtype = accumulation_dtype(x.dtype)
        assert actual[name].dtype == dtype, name
        # Coarser buffers round what goes into them and what comes out.
        coarse = torch.float32 if x.dtype != torch.float64 else torch.float64
        assert_close(actual[name], value, dtype if dtype == x.dtype else coarse, name)
