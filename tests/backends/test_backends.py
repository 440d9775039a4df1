"""What every operator must do beside being right (tests/functional)."""

import copy
import os
import platform
from pathlib import Path

import pytest
import torch

from wsbcn_mm import (
    BatchChannelNorm1d,
    BatchChannelNorm2d,
    BatchChannelNorm3d,
    WSConv1d,
    WSConv2d,
    WSConv3d,
    WSConvTranspose2d,
    backends,
    batch_channel_norm,
    weight_standardize,
)
from wsbcn_mm.backends import cpu, eager, schemas
from wsbcn_mm.backends.carriers import Affine, Running

needs_cpu_kernels = pytest.mark.skipif(cpu.unavailable() is not None, reason=f'{cpu.unavailable()}')
LAYOUTS = {'rows': torch.contiguous_format, 'channels_last': torch.channels_last}


# ----------------------------------------------------------------------------------------------
# Operators


def bcn_arguments(layout='rows', dtype=torch.float32, shape=(2, 12, 7, 9)):
    """x, num_groups, running, affine, rate, eps."""
    x = (torch.randn(shape) * 3 + 5).to(dtype).to(memory_format=LAYOUTS[layout])
    c = shape[1]
    counters = torch.zeros(2, c, dtype=torch.int64), torch.tensor(7)
    running = Running(torch.randn(c), torch.rand(c) + 0.5, *counters)
    affine = Affine(torch.randn(c), torch.randn(c), torch.randn(4), torch.randn(4))
    return x, 4, running, affine, 0.1, 1e-5


def every_operator(kernels, layout, dtype=torch.float32, shape=(2, 12, 7, 9)):
    """Calls each operator once; its results, and the buffers, by name."""
    args = x, groups, running, affine, rate, eps = bcn_arguments(layout, dtype, shape)
    by_batch = Running(*(buffer.clone() for buffer in running))
    frozen = kernels.evaluate(x, groups, running, affine, eps)
    m, q = kernels.row_moments(x)
    y, statistics = kernels.normalize_with_estimates(*args)
    batch = y, statistics
    if x.numel() > x.size(1):  # a single value has no variance
        batch = kernels.normalize_with_batch(x, groups, by_batch, affine, rate, eps)
        assert by_batch.num_batches_tracked == 8
    assert running.num_batches_tracked == 8  # the update alone is counted
    again = kernels.normalize(x, groups, *statistics[:4], affine, eps)
    grad = torch.randn(x.shape).to(dtype).to(memory_format=LAYOUTS[layout])
    backward = [
        kernels.normalize_backward(grad, x, groups, statistics, outer, eps, through)
        for outer, through in (
            (affine, False),
            (affine._replace(bias=torch.randn(shape[1])), True),
            (affine._replace(weight=None, bias=None), False),
        )
    ]
    weight = torch.randn(6, 4, 3, 3).to(dtype)
    standardized = []
    for formula in ('paper', 'var_eps', 'std_eps'):
        w_hat, w_mean, sigma = kernels.standardize(weight, 1e-3, formula, dtype)
        g = torch.randn(weight.shape).to(dtype)
        dw = kernels.standardize_backward(g, weight, w_mean, sigma, 1e-3, formula)
        standardized += [w_hat, w_mean, sigma, dw]
    return [
        *(frozen, m, q, y, *statistics, batch[0], *batch[1], *again, *running, *by_batch),
        *(t for grad_x, gradients in backward for t in (grad_x, *gradients)),
        *standardized,
    ]


@needs_cpu_kernels
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('shape', [(2, 12, 7, 9), (1, 12, 1, 1), (3, 12, 40, 37)])
def test_operators_of_both_backends_agree(layout, shape):
    results = []
    for kernels in (eager.kernels(), cpu.kernels()):
        torch.manual_seed(0)
        results.append(every_operator(kernels, layout, torch.float64, shape))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 parameters and buffers
        if a.dim() == 4:
            assert a.is_contiguous(memory_format=LAYOUTS[layout]) == b.is_contiguous(
                memory_format=LAYOUTS[layout]
            )


@needs_cpu_kernels
@pytest.mark.parametrize('threads', [1, 2, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_cpu_results_are_bit_equal_whatever_the_threads_and_memory(layout, dtype, threads):
    """No element is left unwritten (new memory is poisoned with NaN), no order of sums varies."""
    shape = (2, 12, 90, 70)  # enough work for several threads
    expected = every_operator(cpu.kernels(), layout, dtype, shape)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(0)
        first = every_operator(cpu.kernels(), layout, dtype, shape)
        torch.manual_seed(0)
        second = every_operator(cpu.kernels(), layout, dtype, shape)
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
    for a, b, c in zip(first, second, expected, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and a.isfinite().all()


@needs_cpu_kernels
@pytest.mark.parametrize('layout', LAYOUTS)
def test_opcheck(layout):
    """Schemas, shapes for torch.compile, and what is declared to be changed in place."""
    x, groups, running, affine, rate, eps = bcn_arguments(layout)
    args = (x, groups, *running, *affine, rate, None, eps)
    m, q = cpu.kernels().row_moments(x)
    gm = torch.randn(2, groups)
    backward = (x, x, groups, m, q, *running[:2], gm, gm, *affine, eps, True)
    given = (m, q, *running[:2])
    weight, stats = torch.randn(6, 4, 3, 3), torch.rand(6) + 0.5
    for name, arguments in {
        'row_moments': (x,),
        'normalize_with_estimates': args,
        'normalize_with_batch': args,
        'evaluate': (x, groups, *running, *affine, eps),
        'normalize': (x, groups, *given, *affine._replace(batch_bias=None, bias=None), eps),
        'normalize_backward': backward,
        'standardize': (weight, 1e-5, 'paper', torch.bfloat16),
        'standardize_backward': (weight, weight, stats, stats, 1e-5, 'std_eps'),
    }.items():
        torch.library.opcheck(getattr(torch.ops.wsbcn_mm, name).default, arguments)


# ----------------------------------------------------------------------------------------------
# torch.compile


# Every pair of a backend and a compiler, of a compiler and a mode, of a backend and a mode.
@pytest.mark.parametrize(
    'backend, compiler, mode',
    [
        ('eager', 'inductor', 'estimate'),
        ('eager', 'aot_eager', 'batch'),
        ('cpu', 'inductor', 'batch'),
        ('cpu', 'aot_eager', 'estimate'),
    ],
)
def test_compile_makes_one_graph(backend, compiler, mode):
    if backends.BACKENDS[backend].unavailable() is not None:
        pytest.skip(backends.BACKENDS[backend].unavailable())

    def make():
        torch.manual_seed(1)
        layers = [WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4, mode=mode)]
        if compiler != 'inductor':  # which may compute in another layout than the gradient's
            layers.append(torch.nn.ReLU(inplace=True))
        return torch.nn.Sequential(*layers).double()

    torch._dynamo.reset()
    plain, other = make(), make()
    compiled = torch.compile(other, fullgraph=True, backend=compiler)
    with backends.use_backend(backend):
        # A compiler of C++ takes seconds for each graph.
        for training in (True, True) if compiler == 'inductor' else (True, True, False):
            results = []
            for net, run in ((plain, plain), (other, compiled)):
                net.train(training)
                net.zero_grad()
                torch.manual_seed(2)
                x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
                x = x.to(memory_format=torch.channels_last).requires_grad_()
                y = run(x)
                y.backward(torch.randn(y.shape, dtype=y.dtype))
                results.append([y, x.grad, *[p.grad for p in net.parameters()], *net.buffers()])
            torch.testing.assert_close(*results, rtol=1e-11, atol=1e-11)
    torch._dynamo.reset()


class Functions(torch.nn.Module):
    """Both functions, without a layer."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, 3, 3))
        self.register_buffer('mean', torch.zeros(8))
        self.register_buffer('var', torch.ones(8))

    def forward(self, x):
        w = weight_standardize(self.weight, formula='std_eps')
        y = torch.nn.functional.conv1d(x, w)
        return batch_channel_norm(y, 4, self.mean, self.var, training=self.training)


PARTS = {
    'functions': (Functions, (2, 3, 9)),
    '1d': (lambda: (WSConv1d(3, 8, 3), BatchChannelNorm1d(8, 4, affine='channel')), (2, 3, 9)),
    '3d': (lambda: (WSConv3d(3, 8, 2), BatchChannelNorm3d(8, 4)), (1, 3, 3, 4, 5)),
    'transposed': (lambda: (WSConvTranspose2d(4, 8, 3), torch.nn.ReLU(True)), (1, 4, 5, 6)),
}


@pytest.mark.parametrize('autocast', [False, True])
@pytest.mark.parametrize('part', PARTS)
def test_every_part_makes_one_graph(part, autocast):
    torch._dynamo.reset()
    make, shape = PARTS[part]
    layers = make()
    plain = layers if isinstance(layers, torch.nn.Module) else torch.nn.Sequential(*layers)
    dtype, bound = (torch.float32, 2**-8) if autocast else (torch.float64, 1e-11)
    other = copy.deepcopy(plain.to(dtype))
    compiled = torch.compile(other, fullgraph=True, backend='eager')
    for _ in range(2):
        x, results = torch.randn(shape, dtype=dtype), []
        for net, run in ((plain, plain), (other, compiled)):
            with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
                y = run(x)
            net.zero_grad()
            torch.manual_seed(1)
            y.backward(torch.randn(y.shape).to(y.dtype))
            results.append([y, *[p.grad for p in net.parameters()], *net.buffers()])
        for expected, found in zip(*results):
            error = (found.double() - expected.double()).abs().max()
            assert expected.any() and error <= bound * expected.double().abs().max()


def test_a_scheduled_rate_is_not_compiled_anew():
    """As a 0-d tensor that is filled; a number that changes would be a new graph each time."""
    torch._dynamo.reset()
    plain, other = BatchChannelNorm2d(8, 2), BatchChannelNorm2d(8, 2)
    rate = other.bn.momentum = torch.tensor(1.0, dtype=torch.float64)
    compiled = torch.compile(other, fullgraph=True, backend='eager')
    x = torch.randn(2, 8, 5, 5)
    with backends.use_backend('eager'):
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(12):
                plain.momentum = 1 / (step + 1)
                rate.fill_(plain.momentum)
                torch.testing.assert_close(compiled(x + step), plain(x + step))
        torch.testing.assert_close(other.bn.running_var, plain.bn.running_var)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------
# Size


@needs_cpu_kernels
def test_large_off_centre_rows_stay_exact():
    """A million values at mean 1000 in float32: sums in single precision would be off."""
    x = torch.randn(1, 2, 1000, 1000) + 1000
    m, q = cpu.kernels().row_moments(x)
    wide = x.double().flatten(2)
    torch.testing.assert_close(m.double(), wide.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(q.double(), wide.var(2, unbiased=False), rtol=1e-6, atol=0)
    m, q = cpu.kernels().row_moments(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(q.double(), wide.var(2, unbiased=False), rtol=1e-6, atol=0)


def every_value_of(dtype):
    """Those that are finite, shuffled; of 16 bits."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = bits[bits.isfinite()]
    return finite[torch.randperm(len(finite), generator=torch.Generator().manual_seed(0))]


@needs_cpu_kernels
@pytest.mark.parametrize('length', [3, 15, 62, 512])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_short_floats_are_read_exactly_and_rounded_once(dtype, layout, length):
    """Whatever the value, subnormal and too large ones too: as float32 that is rounded."""
    values = every_value_of(dtype)
    values = values[: len(values) // (8 * length) * 8 * length]
    x = values.reshape(-1, 8, length, 1).contiguous(memory_format=LAYOUTS[layout])
    grad = values.flip(0).reshape(x.shape).contiguous(memory_format=LAYOUTS[layout])
    scale = torch.tensor([1.0, 1e-4, 1e-6, 1e-39, 3e4, 7e4, 1e38, -1.0])  # to both ends

    def run(x, grad):
        x = x.clone().requires_grad_()
        running = torch.zeros(8), torch.full((8,), 1e3)
        y = batch_channel_norm(x, 8, *running, weight=scale.clone())
        y.backward(grad)
        return y.detach(), x.grad

    for short, full in zip(run(x, grad), run(x.float(), grad.float()), strict=True):
        torch.testing.assert_close(short, full.to(dtype), rtol=0, atol=0, equal_nan=True)
    x[0, 0, 0], x[0, 1, 1], x[0, 2, 2] = float('inf'), float('-inf'), float('nan')
    for short, full in zip(run(x, grad), run(x.float(), grad.float()), strict=True):
        torch.testing.assert_close(short, full.to(dtype), rtol=0, atol=0, equal_nan=True)


@needs_cpu_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(dtype):
    weight = (torch.randn(64, 37) * torch.logspace(-4, 4, 64)[:, None]).to(dtype)
    full = weight_standardize(weight.float(), 1e-2)
    for of_result in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        w_hat = weight_standardize(weight, 1e-2, dtype=of_result)
        assert torch.equal(w_hat, full.to(of_result))


@needs_cpu_kernels
@pytest.mark.parametrize('layout', LAYOUTS)
def test_constant_channels_far_from_zero_become_zero(layout):
    """A channel that died is as large as its mean says, not as its rounding."""
    for value, channels in ((0.37, 8), (3.3, 64), (3.3, 256)):
        x = torch.full((2, channels, 32, 32), value).contiguous(memory_format=LAYOUTS[layout])
        running = torch.full((channels,), value), torch.full((channels,), 1e-8)
        y = batch_channel_norm(x, channels // 4, *running)
        assert y.abs().max() < 1e-6


@needs_cpu_kernels
@pytest.mark.parametrize('layout', LAYOUTS)
def test_statistics_far_from_zero_keep_their_digits(layout):
    for channels, offset in ((8, 30), (8, 100), (64, 100)):
        x = torch.randn(2, channels, 32, 32) + offset * torch.rand(channels, 1, 1)
        x = x.contiguous(memory_format=LAYOUTS[layout])
        m, q = cpu.kernels().row_moments(x)
        wide = x.double().flatten(2)
        torch.testing.assert_close(m.double(), wide.mean(2), rtol=1e-7, atol=2e-6)
        torch.testing.assert_close(q.double(), wide.var(2, unbiased=False), rtol=2e-6, atol=0)


@pytest.mark.parametrize('backend', ['eager', 'cpu'])
def test_torch_knows_that_the_buffers_have_changed(backend):
    if backends.BACKENDS[backend].unavailable() is not None:
        pytest.skip(backends.BACKENDS[backend].unavailable())
    mean, var = torch.zeros(4), torch.ones(4)
    before = mean._version, var._version
    with backends.use_backend(backend):
        batch_channel_norm(torch.randn(2, 4, 3), 2, mean, var, training=False)
        assert (mean._version, var._version) == before
        batch_channel_norm(torch.randn(2, 4, 3), 2, mean, var, training=True)
    assert mean._version > before[0] and var._version > before[1]


def test_buffers_of_another_dtype_than_the_input():
    for backend in ('eager', 'cpu'):
        if backends.BACKENDS[backend].unavailable() is not None:
            continue
        mean, var = torch.zeros(4, dtype=torch.bfloat16), torch.ones(4, dtype=torch.bfloat16)
        with backends.use_backend(backend):
            x = torch.randn(2, 4, 3, 3) + 1
            batch_channel_norm(x, 2, mean, var, training=True, momentum=1.0)
        torch.testing.assert_close(mean, x.mean((0, 2, 3)).bfloat16())


@needs_cpu_kernels
def test_kernels_that_were_compiled_before_an_entry_came_are_told_by_the_list_of_entries():
    listed = {entry.partition('(')[0] for entry in schemas.ENTRIES}
    there = {name for name in dir(cpu.entries) if not name.startswith('_')}
    assert there == {name for name in listed if '.' not in name}


@needs_cpu_kernels
@pytest.mark.skipif(platform.machine() != 'x86_64', reason='needs an x86-64')
@pytest.mark.skipif(not Path('/proc/cpuinfo').exists(), reason='needs Linux')
def test_the_kernels_use_the_widest_registers_of_the_machine():
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith('flags')).split())
    v3 = {'avx2', 'bmi1', 'bmi2', 'f16c', 'fma', 'abm', 'movbe'} <= flags
    v4 = v3 and {'avx512f', 'avx512bw', 'avx512cd', 'avx512dq', 'avx512vl'} <= flags
    assert backends.register_bytes() == (64 if v4 else 32 if v3 else 16)


@needs_cpu_kernels
@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='needs Linux')
def test_memory_is_kept_for_the_next_pass_and_released():
    def resident():
        return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

    weight = torch.ones(2048, 8192)  # 64 MB
    w_hat = weight_standardize(weight)
    with_result = resident()
    del w_hat
    assert with_result - resident() < 2**20
    backends.release_memory()
    assert with_result - resident() > 60 * 2**20
