"""Compilation of the Triton kernels, and what only a GPU shows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backends.triton.cases import (
    DEVICE,
    LAYOUTS,
    assert_close,
    double,
    in_layout,
    launch,
    make_affine,
    make_input,
    make_running,
    run,
)
from wsbcn_mm import reference
from wsbcn_mm.backends.carriers import Affine
from wsbcn_mm.backends.triton import weights

COMPILE = """
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.backends.triton import cuts, device, launch, variants

class Machine:
    '''What Triton asks of a GPU before it launches something: an H100 on which nothing runs.'''
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

@triton.jit
def probe(x):
    tl.store(x, 1.0)

triton.runtime.driver.set_active(Machine())
try:
    probe.warmup(torch.empty(1), grid=(1,)).asm['cubin']
except Exception as error:
    print(f'this Triton cannot compile without a GPU: {error!r}')
    raise SystemExit(77)

compiled = set()

def start(kernel, grid, *args, **constants):
    '''In place of a launch: compiles what would be launched.'''
    result = kernel.warmup(*args, grid=grid, **constants)
    variants.check_parameters(result, list(args))
    compiled.add((kernel.__name__, result.hash))

device.start = start

def bcn(x, groups, outer, rate, batch=False):
    w = torch.empty(x.size(1))
    a = torch.empty(outer) if outer else None
    counters = torch.empty(2, x.size(1), dtype=torch.int64), torch.empty((), dtype=torch.int64)
    running = Running(w, w, *counters)
    affine = Affine(w, w, a, a)
    if batch:
        _, statistics = launch.normalize_with_batch(x, groups, running, affine, rate, 1e-5)
    else:
        _, statistics = launch.normalize_with_estimates(x, groups, running, affine, rate, 1e-5)
    given = Affine(w, None, a, None)
    launch.normalize_backward(x, x, groups, statistics, given, 1e-5, batch)
    return statistics, given

for dtype, formula in zip(
    (torch.float32, torch.bfloat16, torch.float64), ('paper', 'std_eps', 'var_eps')
):
    bcn(torch.empty(2, 64, 200, 304, dtype=dtype), 32, 32, 0.1)
    before = len(compiled)
    bcn(torch.empty(2, 64, 192, 328, dtype=dtype), 32, 32, 0.1)
    assert len(compiled) == before, 'another size of image compiled something anew'
    if dtype == torch.bfloat16:
        bcn(torch.empty(4, 64, 7, 7, dtype=dtype), 32, 32, 0.1)
    weight = torch.empty(8, 3, 3, 3, dtype=dtype)
    w_hat, mean, sigma = launch.standardize(weight, 1e-5, formula, torch.bfloat16)
    launch.standardize_backward(w_hat, weight, mean, sigma, 1e-5, formula)
    mean, sigma = torch.cat([mean] * 3), torch.cat([sigma] * 3)
    many, results, offsets = [weight] * 3, [w_hat] * 3, [0, 8, 16]
    launch.standardize_all(many, 1e-5, formula, results, mean, sigma)
    launch.standardize_all_backward(results, many, offsets, mean, sigma, 1e-5, formula, many)
channels_last = torch.empty(2, 6, 25, 27).to(memory_format=torch.channels_last)
for most in (cuts.HELD, 0):
    cuts.HELD = cuts.HELD_BACKWARD = most
    statistics, affine = bcn(channels_last, 2, 6, 0.1, batch=True)
    launch.normalize(channels_last, 2, *statistics[:4], affine, 1e-5)
    bcn(torch.empty(2, 64), 1, 0, None)
launch.row_moments(torch.empty(2, 64, 200, 304))
cuts.HELD = cuts.HELD_BACKWARD = 4096
cuts.HELD_AT_ONCE = 0
bcn(torch.empty(8, 64, 7, 7), 32, 32, 0.1)
bcn(torch.empty(8, 64, 14, 14), 32, 32, 0.1)
print(len({name for name, _ in compiled}), len(compiled))
"""


def test_kernels_compile(tmp_path, monkeypatch):
    """Everything that `launch` launches, down to machine code for an H100, on any machine."""
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))  # nothing compiled earlier
    monkeypatch.setenv('PYTHONPATH', str(Path(__file__).parents[3]))
    script = tmp_path / 'compile_kernels.py'  # Triton reads the source of what it compiles
    script.write_text(COMPILE)
    result = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=600
    )
    if result.returncode == 77:
        pytest.skip(result.stdout)
    assert result.returncode == 0, result.stderr
    kernels, variants = map(int, result.stdout.split())
    several = 2 * (weights.AT_ONCE > 1)  # kernels of many weights; Triton 3.2 has no tuples
    assert kernels == 11 + several and variants >= 2 * kernels


needs_gpu = pytest.mark.skipif(DEVICE == 'cpu', reason='needs a GPU')


@needs_gpu
def test_cuda_graph():
    x, grad = (make_input((2, 64, 30, 31), dtype=torch.float32) for _ in range(2))
    weight = make_input((8, 3, 3, 3), dtype=torch.float32)
    args = x, 32, make_running(64), make_affine(64, 32), grad, 'estimate'

    def everything():
        w_hat, mean, sigma = launch.standardize(weight, 1e-5, 'paper', torch.float16)
        dw = launch.standardize_backward(w_hat, weight, mean, sigma, 1e-5, 'paper')
        return run(*args) | dict(w_hat=w_hat, dw=dw)

    everything()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything()
    for value in (x, grad, weight):
        value.copy_(make_input(value.shape))
    graph.replay()
    expected = everything()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


@needs_gpu
@pytest.mark.parametrize('layout', LAYOUTS)
def test_more_than_2_to_the_31_elements(layout):
    shape, groups = (3, 8, 9600, 9600), 4
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip('needs 32 GB of free memory')
    x = in_layout(torch.randn(shape, device=DEVICE, dtype=torch.float16), layout)
    assert x.numel() > 2**31
    check_last_group(x, groups)


def check_last_group(x, groups):
    """Of the last sample: all of x would not fit in float64."""
    running, width = make_running(x.size(1), torch.float32), x.size(1) // groups
    none = Affine(None, None, None, None)
    y, statistics = launch.normalize_with_estimates(x, groups, running, none, None, 1e-5)
    grad = y
    dx, _ = launch.normalize_backward(grad, x, groups, statistics, none, 1e-5, False)
    part = double(x[-1:, -width:]).requires_grad_()
    expected = reference.normalize(part, *(double(b[-width:]) for b in running[:2]), 1)
    (gradient,) = torch.autograd.grad(expected, part, double(grad[-1:, -width:]))
    assert_close(statistics.m[-1, -width:], part.detach().mean((0, 2, 3)), torch.float32, 'm')
    assert_close(y[-1:, -width:], expected.detach(), x.dtype, 'y')
    assert_close(dx[-1:, -width:], gradient, x.dtype, 'grad_x')
