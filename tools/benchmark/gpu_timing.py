"""What only a GPU can tell: the time of its kernels without the host, launches, the host's time."""

import ctypes
import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch

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

    return {'forward': _replay(forward, repeats), 'both': _replay(case.run, repeats)}


def _replay(call: Callable[[], None], repeats: int) -> dict:
    return _replayed(captured(call, _CAPTURED_CALLS), repeats, _CAPTURED_CALLS)


def _replayed(graph: torch.cuda.CUDAGraph, repeats: int, calls: int) -> dict:
    clock, samples = Clock(torch.device('cuda')), []
    for _ in range(repeats + 1):
        start = clock.mark()
        graph.replay()
        samples.append(clock.ms(start, clock.mark()) / calls)
    return summary(samples[1:])


def captured(
    call: Callable[[], None], calls: int = 1, keep_graph: bool = False
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls; what is compiled or tuned at the first ones is not in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    # Autograd's thread holds the last node of the last call for a moment: that of a parameter,
    # which would then be captured together with a stream that is not.
    time.sleep(0.02)
    graph = torch.cuda.CUDAGraph(keep_graph=True) if keep_graph else torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph


def launched(case: Case, repeats: int) -> dict[str, float]:
    """Milliseconds of all kernels and copies of one call, by replay, and how many there are.

    Not by torch's profiler: once it has run in a process, every later launch takes longer.
    """
    graph = captured(case.run, keep_graph=hasattr(torch.cuda.CUDAGraph, 'raw_cuda_graph'))
    found = dict(kernels_ms=_replayed(graph, repeats, 1)['ms'])
    if hasattr(graph, 'raw_cuda_graph'):  # torch 2.8 and later
        number = ctypes.c_size_t()
        nodes = ctypes.CDLL('libcuda.so.1').cuGraphGetNodes
        error = nodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(number))
        assert error == 0, f'cuGraphGetNodes: CUDA error {error}'
        found['launches'] = number.value
    return found


def host(cases: dict[str, Case], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds that the host takes to launch a step on an idle GPU: nothing is waited for.

    Of ``repeats`` rounds in changing order the median, of each phase alone.
    """
    phases = 'forward', 'backward', 'update'
    samples: dict[str, list[list[float]]] = {name: [] for name in cases}
    order, generator = list(cases), random.Random(0)
    for _ in range(repeats):
        generator.shuffle(order)
        for name in order:
            case = cases[name]
            case.prepare()
            torch.cuda.synchronize()
            marks = [time.perf_counter()]
            result = case.forward()
            marks.append(time.perf_counter())
            case.backward(result)
            marks.append(time.perf_counter())
            case.update()
            marks.append(time.perf_counter())
            samples[name].append([(b - a) * 1e3 for a, b in itertools.pairwise(marks)])
    torch.cuda.synchronize()
    return {
        name: dict(zip(phases, map(statistics.median, zip(*rows))))
        for name, rows in samples.items()
    }
