"""What the Triton kernels touch: memory, arguments that do not fit, launches and allocations."""

import pytest
import torch

from tests.backends.triton.cases import (
    DEVICE,
    LAYOUTS,
    check,
    launch,
    make_affine,
    make_input,
    make_running,
    rand,
    run,
)
from tests.backends.triton.conftest import CUTS
from wsbcn_mm.backends.carriers import Affine, Running
from wsbcn_mm.backends.triton import cuts, device

# ----------------------------------------------------------------------------------------------
# Everything is written, and nothing around it


@pytest.fixture
def guarded(monkeypatch):
    """Every new tensor is NaN, and so is the memory around it, before the kernels and after."""
    guards, margin = [], 64
    empty, empty_like = torch.empty, torch.empty_like

    def guarded_empty(shape, dtype):
        numel = torch.Size(shape).numel()
        memory = empty(numel + 2 * margin, dtype=dtype, device=DEVICE).fill_(torch.nan)
        guards.extend((memory[:margin], memory[margin + numel :]))
        return memory[margin : margin + numel].view(shape)

    def guarded_empty_like(x, dtype=None):
        flat = guarded_empty((x.numel(),), dtype or x.dtype)
        return flat.as_strided(x.shape, empty_like(x).stride(), flat.storage_offset())

    def one_by_one(x, *shapes):
        return [guarded_empty(shape, device.accumulation_dtype(x.dtype)) for shape in shapes]

    def flat(x, *sizes):
        return one_by_one(x, *((size,) for size in sizes))

    monkeypatch.setattr(device, 'small_results', one_by_one)
    monkeypatch.setattr(device, 'scratch', flat)
    monkeypatch.setattr(torch, 'empty_like', guarded_empty_like)
    yield
    monkeypatch.undo()
    assert len(guards) >= 8
    assert all(guard.isnan().all() for guard in guards)


@pytest.mark.parametrize('cut', ['held', 'passes', 'small tiles'], indirect=True)
@pytest.mark.parametrize('mode, layout', [*zip(['estimate', 'batch'], LAYOUTS)])
def test_everything_is_written_and_nothing_around_it(layout, mode, cut, guarded):
    x, grad = (make_input((2, 6, 5, 7), layout, torch.float32) for _ in range(2))
    affine = make_affine(6, 3)
    inputs = x, grad, *affine
    before = [value.clone() for value in inputs]
    check(x, 3, make_running(6, torch.float32), affine, grad, mode)
    assert all(torch.equal(value, old) for value, old in zip(inputs, before))


def test_small_results_share_an_allocation_and_no_memory():
    shapes = (2, 3), (5,), (0,), (1, 2, 2)
    x = torch.zeros(2, 3, dtype=torch.float16, device=DEVICE)
    results = device.small_results(x, *shapes)
    assert [result.shape for result in results] == [torch.Size(shape) for shape in shapes]
    assert len({result.untyped_storage().data_ptr() for result in results}) == 1
    assert all(r.dtype == torch.float32 and r.is_contiguous() for r in results)
    assert all(r.data_ptr() % 16 == 0 for r in results)
    for k, result in enumerate(results):
        result.fill_(k)
    assert all((result == k).all() for k, result in enumerate(results))
    first, second = device.scratch(x, 5, 3)
    assert first.numel() >= 5 and second.numel() >= 3
    assert second.data_ptr() - first.data_ptr() == 4 * first.numel()
    assert first.data_ptr() % 16 == second.data_ptr() % 16 == 0


# ----------------------------------------------------------------------------------------------
# Launches and allocations

PASSES = ['moments', 'forward_algebra', 'forward_apply']
BACKWARD = ['backward_sums', 'backward_algebra', 'backward_apply']
# By the way x is cut, and whether the statistics depend on x and carry gradient.
EXPECTED = {
    ('held', 'estimate'): (['forward_held'], ['backward_held']),
    ('held', 'evaluate'): (['forward_held'], ['backward_held']),
    ('held', 'batch'): (['forward_held'], ['backward_held']),
    ('passes', 'estimate'): (PASSES, BACKWARD),
    ('passes', 'evaluate'): (PASSES, BACKWARD),
    ('passes', 'batch'): (PASSES, BACKWARD),
}


@pytest.fixture
def allocations(monkeypatch):
    """How many tensors `torch.empty` and `torch.empty_like` made."""
    made = []
    for name in ('empty', 'empty_like'):
        original = getattr(torch, name)

        def recording(*args, original=original, **kwargs):
            made.append(original)
            return original(*args, **kwargs)

        monkeypatch.setattr(torch, name, recording)
    return made


@pytest.mark.parametrize('cut, mode', EXPECTED, indirect=['cut'])
def test_launches_and_allocations_of_a_layer(cut, mode, launches, allocations):
    x, grad = (make_input((3, 4, 6), dtype=torch.float32) for _ in range(2))
    running, affine = make_running(4), make_affine(4, 2)
    forward, backward = EXPECTED[cut, mode]
    run(x, 2, running, affine, grad, mode)
    assert launches == forward + backward
    # Forward y, backward dx, and for each one allocation of what is kept and one of what is not.
    assert len(allocations) <= 6
    if mode == 'evaluate':
        launches.clear(), allocations.clear()
        launch.evaluate(x, 2, running, affine, 1e-5)
        assert launches == forward
        assert len(allocations) <= 3


def test_chunks_are_merged_by_the_algebra(launches, monkeypatch):
    for name, value in CUTS['small tiles'].items():
        monkeypatch.setattr(cuts, name, value)
    x = make_input((1, 2, 100), dtype=torch.float32)
    run(x, 1, make_running(2), make_affine(2, 0), x, 'batch')
    assert launches == PASSES + BACKWARD
    launches.clear()
    launch.row_moments(x)
    assert launches == ['moments', 'merge_moments']


def held(shape, groups, itemsize=4, contiguous=True, most=cuts.HELD):
    limits = most, cuts.HELD_AT_ONCE, cuts.HELD_SAMPLES
    return cuts.held_shape(torch.Size(shape), contiguous, itemsize, groups, limits)


def test_which_maps_a_program_holds():
    """A few RoIs and the last levels of a pyramid."""
    for shape in ((1, 256, 25, 42), (2, 256, 25, 42), (4, 256, 7, 7), (4, 256, 14, 14)):
        assert held(shape, 32) is not None, shape
    for shape in ((512, 256, 7, 7), (5, 256, 7, 7), (3, 256, 25, 42)):  # too many samples
        assert held(shape, 32) is None, shape
    for shape in ((1, 256, 50, 84), (1, 2048, 25, 42), (1, 64, 400, 672)):
        assert held(shape, 32) is None, shape
    assert held((1, 256, 25, 42), 32, itemsize=8) is None  # twice the registers
    assert held((1, 256, 25, 42), 32, most=cuts.HELD_BACKWARD) is None
    assert held((4, 256, 14, 14), 32, most=cuts.HELD_BACKWARD) is not None
    assert held((4, 256, 7, 7), 32, contiguous=False).layout['AXIS'] == 0
    assert held((1, 2**20, 2048), 2**20) is None  # more places than 32 bits number


@pytest.mark.parametrize('contiguous', [True, False])
@pytest.mark.parametrize('shape', [(1, 64, 200, 304), (2, 2048, 7, 7), (4, 256), (1, 1, 10**10)])
def test_x_is_cut_completely_and_into_enough_programs(shape, contiguous):
    samples, channels, *positions = shape
    length = torch.Size(positions).numel()
    for programs in (cuts.REDUCING, cuts.APPLYING):
        cut = cuts.cut_shape(torch.Size(shape), contiguous, 2, programs, cuts.TILE)
        block_c, block_l = cut.layout['BLOCK_C'], cut.layout['BLOCK_L']
        chunk = cut.tiles * block_l
        assert block_c * block_l <= cuts.TILE
        assert cut.grid == (samples * -(-channels // block_c), cut.splits)
        assert (cut.splits - 1) * chunk < length <= cut.splits * chunk  # no chunk is empty
        assert cut.splits <= 65535  # CUDA's limit for the second axis of a grid
        assert cut.tiles == 1 or cut.grid[0] * cut.splits > 0.8 * programs


# ----------------------------------------------------------------------------------------------
# What does not fit x is refused before memory is touched

NONE = Affine(None, None, None, None)


def wrong_forward():
    """x, running, affine, rate, and what is said about them."""
    x, running, affine = make_input((2, 6, 9)), make_running(6), make_affine(6, 3)
    short = running._replace(mean=running.mean[:4])
    yield x, short, affine, 0.1, ValueError, r'running_mean must have shape \(6,\).*\n  got \(4,\)'
    whole = running._replace(var=running.var.long())
    yield x, whole, affine, 0.1, TypeError, 'running_var must be one of .*\n  got torch.int64'
    counts = running._replace(counts=running.counts[:1])
    yield x, counts, affine, 0.1, ValueError, r'counts must have shape \(2, 6\)'
    counts = running._replace(counts=running.counts.t().contiguous().t())
    yield x, counts, affine, 0.1, ValueError, 'counts must have .* be contiguous'
    counts = running._replace(counts=running.counts.int())
    yield x, counts, affine, 0.1, TypeError, 'counts must be torch.int64'
    tracked = running._replace(num_batches_tracked=running.num_batches_tracked.float())
    yield x, tracked, affine, 0.1, ValueError, 'num_batches_tracked must be one torch.int64'
    for name, sizes in (('batch_weight', r'\(6,\)'), ('bias', r'\(3,\) or \(6,\)')):
        pruned = affine._replace(**{name: torch.ones(2, dtype=x.dtype, device=DEVICE)})
        yield x, running, pruned, 0.1, ValueError, f'{name} must have shape {sizes}, .*\n  got .2,'
    elsewhere = affine._replace(weight=affine.weight.to('meta'))
    message = f'weight must be on the device of the input, {DEVICE}.*\n  got meta'
    yield x, running, elsewhere, 0.1, ValueError, message
    elsewhere = Running(running.mean.to('meta'), running.var)
    yield x, elsewhere, affine, 0.1, ValueError, 'running_mean must be on the device'
    yield x, running, affine, rand(2), ValueError, r'rate must have shape \(\)'
    rate = torch.zeros((), device='meta')
    yield x, running, affine, rate, ValueError, 'rate must be on .* or the CPU\n  got meta'
    yield x[:0], running, affine, 0.1, ValueError, r'not be empty\n  got shape \(0, 6, 9\)'
    yield x[:, :5], running, affine, 0.1, ValueError, 'num_groups must divide the channels of x, 5'
    yield x.long(), running, affine, 0.1, TypeError, 'x must be one of'


def test_arguments_that_do_not_fit_are_refused(launches):
    cases = list(wrong_forward())
    assert len(cases) == 15
    for x, running, affine, rate, error, message in cases:
        for function in (launch.normalize_with_estimates, launch.normalize_with_batch):
            with pytest.raises(error, match=message):
                function(x, 3, running, affine, rate, 1e-5)
    assert launches == []


def test_statistics_and_gradients_that_do_not_fit_are_refused(launches):
    x, affine = make_input((2, 6, 4, 5)), make_affine(6, 3)
    y, statistics = launch.normalize_with_estimates(x, 3, make_running(6), NONE, None, 1e-5)
    launches.clear()

    def backward(grad=y, statistics=statistics, affine=affine):
        launch.normalize_backward(grad, x, 3, statistics, affine, 1e-5, False)

    with pytest.raises(ValueError, match=r'grad must have shape \(2, 6, 4, 5\)'):
        backward(grad=y[:, :4])
    with pytest.raises(ValueError, match=r'q must have shape \(2, 6\)'):
        backward(statistics=statistics._replace(q=statistics.q[:1]))
    with pytest.raises(TypeError, match=r'mean must be torch.float64\n  got torch.float32'):
        backward(statistics=statistics._replace(mean=statistics.mean.float()))
    with pytest.raises(ValueError, match=r'group_mean must have shape \(2, 3\)'):
        backward(statistics=statistics._replace(group_mean=statistics.group_mean[:, :2]))
    with pytest.raises(ValueError, match=r'batch_weight must have shape \(6,\)'):
        backward(affine=affine._replace(batch_weight=rand(3)))
    m, q, mean, var, *_ = statistics
    with pytest.raises(ValueError, match=r'var must have shape \(6,\)'):
        launch.normalize(x, 3, m, q, mean, var[:3], affine, 1e-5)
    assert launches == []
