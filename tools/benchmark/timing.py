"""How time and memory are measured; knows nothing of what is measured."""

import contextlib
import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PHASES = ('forward', 'backward', 'both')
BANDWIDTH_BYTES = 256 * 2**20
# A sample is at least about this long: many calls where one takes microseconds. On a GPU longer, so
# that the host's first steps ahead of it weigh as little as they do in training.
_SAMPLE_MS = {'cpu': 5.0, 'cuda': 60.0}
_MAX_CALLS = 50


def _nothing(*_) -> None:
    pass


@dataclass
class Case:
    """One thing to time. ``prepare`` is not timed; ``backward`` gets what ``forward`` returned.

    ``update`` is an optimizer's step, and counts to ``backward``.
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], None] = _nothing
    prepare: Callable[[], None] = _nothing
    update: Callable[[], None] = _nothing

    def run(self) -> None:
        """All of it."""
        self.prepare()
        self.backward(self.forward())
        self.update()


class Clock:
    """Marks on the timeline of a device. On CUDA they are events: the time of the GPU itself.

    ``cpu_time`` counts what the process itself computes, all threads together: with one thread, and
    other work on the machine, more to the point than the time that passes.
    """

    def __init__(self, device: torch.device, cpu_time: bool = False) -> None:
        self.cuda = device.type == 'cuda'
        self.now = time.process_time if cpu_time else time.perf_counter

    def mark(self) -> torch.cuda.Event | float:
        """Now."""
        if not self.cuda:
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        """Milliseconds from one mark to another; both from `mark`."""
        if not self.cuda:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        """Waits until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize()


def _sample(case: Case, clock: Clock, calls: int) -> dict[str, float]:
    """Milliseconds of one call, the median over ``calls``."""
    marks = []
    clock.synchronize()
    for _ in range(calls):
        case.prepare()
        start = clock.mark()
        result = case.forward()
        middle = clock.mark()
        case.backward(result)
        case.update()
        marks.append((start, middle, clock.mark()))
        del result  # not while the next call is timed
    forward = statistics.median(clock.ms(start, middle) for start, middle, _ in marks)
    both = statistics.median(clock.ms(start, end) for start, _, end in marks)
    return {'forward': forward, 'backward': both - forward, 'both': both}


def summary(samples: list[float]) -> dict:
    """Median and interquartile range in milliseconds, and the samples, one per round."""
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {'ms': statistics.median(samples), 'iqr_ms': high - low, 'samples_ms': samples}


def round_robin(
    cases: dict[str, Case],
    device: torch.device,
    repeats: int,
    warm_up: int = 3,
    cpu_time: bool = False,
) -> dict[str, dict[str, dict]]:
    """Times all cases, one sample of each per round, so that a slow minute hits every one.

    The order is another one in every round: what a case leaves behind (caches, threads that wait
    for more work) slows down whatever comes next, and that must not always be the same one.

    Args:
        cases: By name.
        device: Whose time counts.
        repeats: Rounds. With one, which only shows that everything runs, little is warmed up.
        warm_up: Calls before anything counts; the first also compiles what is compiled then.
        cpu_time: As in `Clock`.

    Returns:
        By case and phase (`PHASES`): `summary`.
    """
    clock = Clock(device, cpu_time)
    calls = {}
    for name, case in cases.items():
        _sample(case, clock, 1 if repeats == 1 else warm_up)
        calls[name] = 1
        if repeats > 1:
            expected = _sample(case, clock, 1)['both']
            calls[name] = max(1, min(_MAX_CALLS, round(_SAMPLE_MS[device.type] / expected)))
    samples: dict[str, dict[str, list[float]]]
    samples = {name: {phase: [] for phase in PHASES} for name in cases}
    order, generator = list(cases), random.Random(0)
    with _no_garbage_collection():
        for _ in range(repeats):
            generator.shuffle(order)
            for name in order:
                for phase, ms in _sample(cases[name], clock, calls[name]).items():
                    samples[name][phase].append(ms)
    return {
        name: {phase: summary(values) for phase, values in phases.items()}
        for name, phases in samples.items()
    }


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def add_ratios(times: dict[str, dict], base: str) -> None:
    """Adds to every phase of every case its ratio to ``base``.

    The median over the rounds of the ratio within a round: a machine whose speed drifts changes
    both times of a round, and not their ratio.
    """
    for phases in times.values():
        for phase, found in phases.items():
            pairs = zip(found['samples_ms'], times[base][phase]['samples_ms'])
            found['ratio'] = statistics.median(mine / theirs for mine, theirs in pairs)


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes per second, read plus written, of ``y.copy_(x)`` with tensors of 256 MB."""
    x = torch.ones(BANDWIDTH_BYTES // 4, device=device)
    y = torch.ones_like(x)
    case = Case(lambda: y.copy_(x))
    times = round_robin({'copy': case}, device, max(repeats, 3))
    return 2 * BANDWIDTH_BYTES / (times['copy']['forward']['ms'] / 1e3)


def saved_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Bytes that ``forward()`` keeps for the backward pass, every storage once.

    Parameters and buffers of ``module`` do not count: they are there anyway.
    """
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()  # kept: a freed address could be given to another tensor
    for tensor in (*module.parameters(), *module.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(storages.values())


def peak_bytes(case: Case) -> int:
    """CUDA memory that one call allocates at its peak, beyond what was allocated before it."""
    case.prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case.run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
