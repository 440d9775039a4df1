"""The launcher in C++ does what `launch` does: the same launches, with results equal to the bit."""

from typing import ClassVar, NamedTuple

import pytest
import torch

from tests.backends.triton import driver as drivers
from tests.backends.triton.cases import (
    DEVICE,
    DTYPES,
    FORMULAS,
    LAYOUTS,
    MODES,
    in_layout,
    launch,
    make_affine,
    make_input,
    make_running,
    rand,
)
from wsbcn_mm import backends
from wsbcn_mm.backends.carriers import Affine, Running, Statistics
from wsbcn_mm.backends.ops import accumulation_dtype
from wsbcn_mm.backends.triton import device, variants
from wsbcn_mm.backends.triton import weights as weights_module

reason = backends.BACKENDS['cpu'].unavailable()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


@pytest.fixture
def both(cut, monkeypatch):
    """Calls an operator of both on copies of its arguments, and compares all that can be seen."""
    planned = []
    driver = drivers.Driver() if DEVICE == 'cpu' else None
    if driver is not None:
        drivers.use(driver, monkeypatch)
    else:
        torch.ops.wsbcn_mm.reset_launcher.default()  # the limits of `cut`

    def recording(kernel, grid, *arguments, **constants):
        planned.append(drivers.launch_of(kernel, grid, list(arguments), constants))
        start(kernel, grid, *arguments, **constants)

    start = device.start
    monkeypatch.setattr(device, 'start', recording)

    def call(operator, *arguments):
        planned.clear()
        ours, theirs = copied(arguments), copied(arguments)
        expected = list(tensors(getattr(launch, operator)(*ours)))
        result = drivers.call(operator, *theirs)
        if driver is not None:
            if driver.error is not None:
                raise driver.error
            assert driver.launches == planned
            driver.launches.clear()
        assert planned
        for a, b in zip([*tensors(result), *tensors(theirs)], [*expected, *tensors(ours)]):
            assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
        assert len(list(tensors(result))) == len(expected)
        return expected

    yield call
    torch.ops.wsbcn_mm.reset_launcher.default()


def copied(values):
    """The values with new memory where they are tensors, strided as before."""
    if isinstance(values, torch.Tensor):
        copy = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=DEVICE)
        return copy.copy_(values)
    if isinstance(values, (Running, Affine)) or hasattr(values, '_fields'):
        return type(values)(*(copied(value) for value in values))
    if isinstance(values, (list, tuple)):
        return type(values)(copied(value) for value in values)
    return values


def tensors(values):
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)


# An even and an odd one, in one position, in several chunks where tiles are small.
SHAPES = [
    ((2, 3, 3, 7), 3),
    ((1, 4, 6, 4), 2),
    ((3, 4, 1, 1), 2),
    ((2, 6), 3),
    ((2, 2, 2, 3, 2), 1),
]
CUTS = ['held', 'passes', 'small tiles']


@pytest.mark.parametrize('cut', CUTS, indirect=True)
@pytest.mark.parametrize('shape, groups', SHAPES)
def test_every_operator_of_bcn(shape, groups, both):
    for k, mode in enumerate(MODES):
        x = make_input(shape, dtype=DTYPES[(k + len(shape)) % 4])
        if len(shape) == 4 and k != 1:
            x = in_layout(x, 'channels_last')
        channels = shape[1]
        running, affine = make_running(channels), make_affine(channels, [groups, channels, 0][k])
        operator = f'normalize_with_{"batch" if mode == "batch" else "estimates"}'
        rate = None if mode == 'evaluate' else 0.3
        y, *found = both(operator, x, groups, running, affine, rate, 1e-3)
        statistics, grad = Statistics(*found), rand(*shape, dtype=x.dtype)
        both('normalize_backward', grad, x, groups, statistics, affine, 1e-3, mode == 'batch')
        if mode == 'estimate':
            both('row_moments', x)
        elif mode == 'batch':
            both('normalize', x, groups, *statistics[:4], affine, 1e-3)
        else:
            (alone,) = both('evaluate', x, groups, running, affine, 1e-3)
            assert torch.equal(alone, y)


@pytest.mark.parametrize('cut', ['held', 'small tiles'], indirect=True)
def test_strided_buffers_and_parameters_and_rates_in_tensors(both):
    x = make_input((2, 6, 9))
    affine = Affine(*(torch.stack([v, v], 1)[:, 1] for v in make_affine(6, 3)))
    dense = make_running(6)
    running = Running(*(torch.stack([b, b], 1)[:, 0] for b in dense[:2]))
    for rate in (0.0, 1.0, torch.tensor(0.25, device=DEVICE), torch.tensor(0.25).half()):
        both('normalize_with_estimates', x, 3, running, affine, rate, 0.0)
        both('normalize_with_batch', x, 3, dense, affine, rate, 1e-5)


def weights_of(layout, dtype):
    shapes = [(5, 3, 3, 3), (4, 2, 1, 1), (1, 16, 3, 1), (8, 4, 3, 3), (4, 4, 2, 2)]
    return [make_input(shape, layout, dtype) for shape in shapes]


@pytest.mark.parametrize('most', [32, 2, 1])
@pytest.mark.parametrize('formula', FORMULAS)
@pytest.mark.parametrize('cut', ['held'], indirect=True)
def test_every_operator_of_ws(formula, most, both, monkeypatch):
    monkeypatch.setattr(weights_module, 'AT_ONCE', min(most, weights_module.AT_ONCE))
    torch.ops.wsbcn_mm.reset_launcher.default()
    dtype, layout = DTYPES[most % 3], LAYOUTS[most % 2]
    weights = weights_of(layout, dtype)
    rows = [len(weight) for weight in weights]
    offsets = [sum(rows[:k]) for k in range(len(rows))]
    mean = torch.empty(sum(rows), dtype=accumulation_dtype(dtype), device=DEVICE)
    sigma, out = torch.empty_like(mean), [torch.empty_like(w) for w in weights]
    arguments = weights, 1e-3, formula, out, mean, sigma
    both('standardize_all', *arguments)
    launch.standardize_all(*arguments)
    grads = [torch.randn_like(weight) for weight in weights]
    part = grads[1:], weights[1:], offsets[1:], mean, sigma, 1e-3, formula
    both('standardize_all_backward', *part, [torch.empty_like(w) for w in weights[1:]])
    for weight, grad in zip(weights[:2], grads):
        _, *statistics = both('standardize', weight, 1e-3, formula, torch.float16)
        both('standardize_backward', grad, weight, *statistics, 1e-3, formula)


@pytest.mark.parametrize('cut', ['small tiles'], indirect=True)
def test_another_size_of_image_compiles_nothing(both, monkeypatch):
    """One variant serves all sizes that lie alike."""
    asked = []
    load = variants.load
    monkeypatch.setattr(variants, 'load', lambda *a: asked.append(a) or load(*a))
    for height in (13, 14, 16):
        x = make_input((1, 2, height, 16), dtype=torch.float32)
        both('normalize_with_estimates', x, 1, make_running(2), make_affine(2, 1), 0.1, 1e-5)
        if height == 13:
            first = len(asked)
    assert len(asked) == first > 0


@pytest.mark.parametrize('cut', ['held'], indirect=True)
def test_bad_arguments_are_refused(both):
    x, running, affine = make_input((2, 6, 4)), make_running(6), make_affine(6, 3)
    shorter = affine._replace(batch_weight=rand(5))
    for bad in [
        (x, 4, running, affine, 0.1, 1e-5),
        (x, 3, running, shorter, 0.1, 1e-5),
        (x, 3, running._replace(mean=rand(7)), affine, 0.1, 1e-5),
        (x, 3, running._replace(counts=torch.zeros(6, device=DEVICE)), affine, 0.1, 1e-5),
        (x, 3, running, affine, rand(2), 1e-5),
    ]:
        with pytest.raises(ValueError, match='must'):
            drivers.call('normalize_with_estimates', *bad)
    with pytest.raises(ValueError, match='formula must be'):
        drivers.call('standardize', rand(4, 3), 1e-5, 'paper_', torch.float32)


def test_any_layout_is_taken(both):
    affine, wide = make_affine(6, 3), make_input((2, 6, 4, 10))
    for x in (wide[..., ::2], wide.transpose(2, 3), wide[:, :, :, 3:]):
        both('row_moments', x)
        others = 3, make_running(6), affine, 0.1, 1e-5
        found, expected = (
            both('normalize_with_estimates', each, *others)[0] for each in (x, x.contiguous())
        )
        assert torch.equal(found, expected)


@pytest.mark.skipif(DEVICE != 'cpu', reason='of a driver that does not launch')
def test_an_error_of_the_driver_is_an_error(monkeypatch):
    driver = drivers.Driver()
    driver.results = [700]
    drivers.use(driver, monkeypatch)
    with pytest.raises(RuntimeError, match='could not launch the kernel standardize .*error 700'):
        drivers.call('standardize', rand(4, 3), 1e-5, 'paper', torch.float32)
    torch.ops.wsbcn_mm.reset_launcher.default()


@pytest.mark.skipif(DEVICE != 'cpu', reason='of a driver that does not launch')
def test_a_thread_without_a_context_gets_one(monkeypatch):
    driver, asked = drivers.Driver(), []
    drivers.use(driver, monkeypatch)
    addresses = variants.addresses
    monkeypatch.setattr(variants, 'addresses', lambda: asked.append(1) or addresses())
    driver.results = [0, 201]  # CUDA_ERROR_INVALID_CONTEXT, after one that succeeds
    for _ in range(2):
        drivers.call('standardize', rand(4, 3), 1e-5, 'paper', torch.float32)
    torch.ops.wsbcn_mm.reset_launcher.default()
    assert driver.error is None and len(driver.launches) == 3 and len(asked) == 2


def test_a_kernel_with_unknown_parameters_is_refused():
    class Compiled:
        asm: ClassVar = {
            'ptx': '.visible .entry k(\n.param .u64 .ptr .global k_0,\n.param .u32 k_1\n)\n{'
        }
        metadata: ClassVar = Launched('k', 0, 1)

    pointer = torch.empty(1)
    assert variants.check_parameters(Compiled, [pointer, 3]) == 0
    assert variants.check_parameters(Compiled, [None, (pointer,), 3]) == 0
    Compiled.asm = {'ptx': '.entry k(.param .u64 k_0, .param .u32 k_1, .param .u64 k_2)'}
    assert variants.check_parameters(Compiled, [pointer, 3]) == 1
    for arguments in ([pointer, 2**40], [pointer, pointer, 3], [pointer, 3, 3]):
        with pytest.raises(RuntimeError, match='does not know how this Triton calls'):
            variants.check_parameters(Compiled, arguments)
    for Compiled.metadata in (Launched('k', 64, 1), Launched('k', 0, 2)):
        with pytest.raises(RuntimeError, match='global_scratch_size|num_ctas'):
            variants.check_parameters(Compiled, [pointer, 3])


class Launched(NamedTuple):
    name: str
    global_scratch_size: int
    num_ctas: int
