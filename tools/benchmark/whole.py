"""The section ``whole``: a ResNet-50 compiled by torch."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmark import peers, timing
from benchmark.settings import Settings, Skipped, name_of, show_progress
from benchmark.timing import Case

SIZE = (800, 1333)
NETWORKS = ('conv + GN', 'WS + BCN')


def whole(settings: Settings) -> Iterator[dict]:
    """By network, in the first dtype: evaluation and training steps, compiled in several ways.

    What raises is noted with its message and timed no further.
    """
    if settings.device.type != 'cuda':
        raise Skipped('it takes minutes without a GPU')
    dtype = settings.dtypes[0]
    ways: dict[str, Callable[..., Case]] = {
        'evaluation, compiled': _compiled_evaluation,
        'evaluation, compiled, reduce-overhead': _reduced_evaluation,
        'training step, compiled': _compiled_training,
    }
    for way, make in ways.items():
        if not settings.begins(f'whole: {way}, {name_of(dtype)}'):
            continue
        found = {name: _timed(settings, make, name, dtype) for name in NETWORKS}
        yield dict(way=way, dtype=name_of(dtype), peers=found)


def _timed(settings: Settings, make: Callable[..., Case], name: str, dtype: torch.dtype) -> dict:
    show_progress(f'  {name}')
    torch.manual_seed(0)
    network = peers.backbones()[name]().to(settings.device)
    try:
        case = make(network, dtype)
        times = timing.round_robin({name: case}, settings.device, settings.repeats)
        return dict(ms=times[name]['both']['ms'])
    except Exception as error:  # noqa: BLE001  # whatever torch raises is the result
        return dict(error=f'{type(error).__name__}: {str(error).partition(chr(10))[0]}')
    finally:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


def _image(network: nn.Module) -> Tensor:
    return torch.randn(1, 3, *SIZE, device=next(network.parameters()).device)


def _training(
    call: Callable[[Tensor], Any], network: nn.Module, image: Tensor, dtype: torch.dtype
) -> Callable[[], None]:
    parameters = list(network.parameters())

    def step() -> None:
        with peers.autocast(image.device, dtype):
            outputs = call(image)
        loss = torch.stack([y.float().mean() for y in outputs]).sum()
        torch.autograd.grad(loss, parameters)

    return step


def _compiled_training(network: nn.Module, dtype: torch.dtype) -> Case:
    compiled = torch.compile(network.train())
    return Case(_training(compiled, network, _image(network), dtype))


def _compiled_evaluation(network: nn.Module, dtype: torch.dtype) -> Case:
    return _evaluation(network, dtype, 'default')


def _reduced_evaluation(network: nn.Module, dtype: torch.dtype) -> Case:
    return _evaluation(network, dtype, 'reduce-overhead')


def _evaluation(network: nn.Module, dtype: torch.dtype, mode: str) -> Case:
    compiled = torch.compile(network.eval(), mode=mode)
    image = _image(network)

    def forward() -> None:
        with torch.no_grad(), peers.autocast(image.device, dtype):
            compiled(image)

    return Case(forward)
