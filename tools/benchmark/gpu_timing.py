"""What only a GPU can tell: the time of its kernels without the host, launches, the host's time."""

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmark.timing import Case, Clock, summary

_CAPTURED_CALLS = 4


def replayed(case: Case, repeats: int) -> dict[str, dict]:
    """Milliseconds of a forward pass, and of both passes, by replays of a CUDA graph.

    In a replay the host launches nothing, so this is the time of the kernels and of the gaps
    between them.

    Returns:
        By phase (``forward``, ``both``): `timing.summary`.
    """

    def forward() -> None:
        case.prepare()
        case.forward()

    def both() -> None:
        case.prepare()
        case.backward(case.forward())

    return {'forward': _replay(forward, repeats), 'both': _replay(both, repeats)}


def _replay(call: Callable[[], None], repeats: int) -> dict:
    graph = captured(call, _CAPTURED_CALLS)
    clock, samples = Clock(torch.device('cuda')), []
    for _ in range(repeats + 1):
        start = clock.mark()
        graph.replay()
        samples.append(clock.ms(start, clock.mark()) / _CAPTURED_CALLS)
    return summary(samples[1:])


def captured(call: Callable[[], None], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls; what is compiled or tuned at the first ones is not in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def launched(case: Case) -> dict[str, float]:
    """Milliseconds of all kernels and copies of one call, and how many there are."""
    calls = 2
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            case.prepare()
            case.backward(case.forward())
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    return dict(
        kernels_ms=sum(event.self_device_time_total for event in events) / 1e3 / calls,
        launches=sum(event.count for event in events) / calls,
    )


def host(case: Case, repeats: int) -> float:
    """Milliseconds that the host takes to launch one call on an idle GPU: nothing is waited for."""
    samples = []
    for _ in range(repeats + 1):
        case.prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        case.backward(case.forward())
        samples.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return statistics.median(samples[1:])
