"""Sections of the benchmark: norms alone, weight standardization alone, a backbone.

Each takes `Settings` and returns what goes into results.json under its name; a `Skipped` says why
there is nothing to return. Others: `host_time`, `detectors`, `whole`.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmark import gpu_timing, peers, timing
from benchmark.gate import LAYOUTS
from benchmark.settings import Settings, name_of, show_progress
from benchmark.timing import Case
from wsbcn_mm import (
    WSConv2d,
    standardize_once_per_forward,
    standardized_once,
    weights_do_not_change,
)
from wsbcn_mm.layers import WeightStandardized

# (N, C, H, W) of activations that a norm sees.
SHAPES = (
    # Mask R-CNN R50-FPN at 800x1333, padded to 800x1344 or (height and width swapped in) 800x1216:
    # stem, stages 1 to 4, FPN, box and mask head.
    (1, 64, 400, 672),
    (1, 64, 200, 304),
    (1, 64, 200, 336),
    (1, 256, 200, 304),
    (1, 256, 200, 336),
    (1, 128, 100, 168),
    (1, 512, 100, 168),
    (1, 256, 50, 84),
    (1, 1024, 50, 76),
    (1, 1024, 50, 84),
    (1, 512, 25, 42),
    (1, 2048, 25, 42),
    (512, 256, 7, 7),
    (128, 256, 14, 14),
    # The same with two images.
    (2, 256, 200, 336),
    (2, 512, 100, 168),
    (2, 256, 50, 76),
    (2, 1024, 50, 84),
    (2, 2048, 25, 42),
    # DeepLabV3 R101 at 513x513, output stride 16.
    (1, 256, 129, 129),
    (1, 512, 65, 65),
    (1, 1024, 33, 33),
    (1, 2048, 33, 33),
    (2, 256, 129, 129),
    (2, 2048, 33, 33),
    # Small images.
    (1, 64, 40, 48),
    (1, 2048, 5, 6),
)
# On a GPU, where every dtype and layout is measured, fewer; the last is over 256 MB in half
# precision too: out of every cache.
CUDA_SHAPES = (
    (1, 64, 400, 672),
    (1, 256, 200, 304),
    (1, 256, 200, 336),
    (1, 512, 100, 168),
    (1, 256, 50, 84),
    (1, 1024, 50, 84),
    (1, 512, 25, 42),
    (1, 2048, 25, 42),
    (512, 256, 7, 7),
    (128, 256, 14, 14),
    (2, 256, 200, 336),
    (1, 2048, 33, 33),
    (1, 64, 40, 48),
    (8, 256, 200, 336),
)
QUICK_SHAPES = ((1, 64, 8, 8), (2, 64, 5, 6))
HELD = ', weights held'  # in evaluation, within `weights_do_not_change`
WIDTH, QUICK_WIDTH = 64, 32  # of the ResNet

# Reads and writes of tensors as large as x that a norm cannot do without, for it needs the
# statistics before it can normalise: forward reads x twice and writes y; backward reads x and the
# gradient of y twice and writes the gradient of x.
PASSES = {'forward': 3, 'backward': 5, 'both': 8}


# ----------------------------------------------------------------------------------------------
# Norms


def norm(settings: Settings) -> Iterator[dict]:
    """Norms at every shape, dtype and layout: all of `peers.NORMS`, on a GPU the quick ones.

    On a GPU also, as ``gpu``, the time of the kernels alone (`gpu_timing.replayed`).
    """
    device = settings.device
    shapes: Sequence[tuple[int, ...]] = CUDA_SHAPES if device.type == 'cuda' else SHAPES
    if settings.quick:
        shapes = QUICK_SHAPES
    bandwidth = timing.copy_bandwidth(device, settings.repeats)
    show_progress(f'copy bandwidth {bandwidth / 1e9:.1f} GB/s')
    kinds = [(d, layout) for layout in settings.layouts for d in settings.dtypes]
    for dtype, layout in kinds:
        for shape in shapes:
            if not settings.begins(f'norm {shape} {name_of(dtype)} {layout}'):
                continue
            row = dict(shape=list(shape), dtype=name_of(dtype), layout=layout)
            yield row | _time_norms(settings, shape, dtype, layout, bandwidth)


def _time_norms(settings, shape, dtype, layout, bandwidth) -> dict:
    device = settings.device
    generator = torch.Generator().manual_seed(0)
    x, cotangent = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    x = (x + 1).requires_grad_()
    modules = peers.norms(shape[1], device, dtype)
    if device.type == 'cuda':
        modules = {name: modules[name] for name in peers.ON_GPU}
    cases = {name: _norm_case(module, x, cotangent) for name, module in modules.items()}
    times: Any = timing.round_robin(cases, device, settings.repeats)
    timing.add_ratios(times, 'GN')
    size = x.numel() * x.element_size()
    for name, module in modules.items():
        times[name]['saved'] = timing.saved_bytes(_then_relu(module, x), module) / size
        if device.type == 'cuda':
            times[name]['peak'] = timing.peak_bytes(cases[name]) / size
            times[name]['gpu'] = gpu_timing.replayed(cases[name], settings.repeats)
    found = times['BCN']
    if device.type == 'cuda':
        timing.add_ratios({name: phases['gpu'] for name, phases in times.items()}, 'GN')
        found = dict(found['gpu'], backward=_difference(found['gpu']))
    share = {
        phase: passes * size / (found[phase]['ms'] / 1e3) / bandwidth
        for phase, passes in PASSES.items()
    }
    return dict(bytes=size, peers=times, copy_bandwidth=bandwidth, share_of_copy_bandwidth=share)


def _difference(phases: dict) -> dict:
    return {'ms': phases['both']['ms'] - phases['forward']['ms']}


def _norm_case(module: nn.Module, x: Tensor, cotangent: Tensor) -> Case:
    def backward(y: Tensor) -> None:
        y.backward(cotangent)

    return Case(lambda: module(x), backward, lambda: _clear_gradients([x, *module.parameters()]))


def _then_relu(module: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.relu_(module(x))


def _clear_gradients(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.grad = None


# ----------------------------------------------------------------------------------------------
# Weight standardization


def ws(settings: Settings) -> Iterator[dict]:
    """Standardizing all weights of a ResNet-50, forward and backward, in every dtype.

    Weights are float32; in half precision the result is cast as autocast would do it. Against what
    the copy bandwidth allows: each weight read and written once, then gradient and weight read and
    the gradient of the weight written.
    """
    bandwidth = timing.copy_bandwidth(settings.device, settings.repeats)
    for dtype in settings.dtypes:
        if not settings.begins(f'ws {name_of(dtype)}'):
            continue
        torch.manual_seed(0)
        width = QUICK_WIDTH if settings.quick else WIDTH
        model = peers.ResNet50(WSConv2d, peers.group_norm, width).to(settings.device)
        times = timing.round_robin(_ws_cases(model, dtype), settings.device, settings.repeats)
        timing.add_ratios(times, 'WS')
        weights = sum(conv.weight.numel() for conv in ws_layers(model))
        moved = weights * (torch.float32.itemsize * 3 + dtype.itemsize * 2)
        yield dict(
            dtype=name_of(dtype),
            peers=times,
            copy_bandwidth=bandwidth,
            limit_ms=moved / bandwidth * 1e3,
        )


def ws_layers(model: nn.Module) -> list[WeightStandardized]:
    """The WS convolutions of a model."""
    return [module for module in model.modules() if isinstance(module, WeightStandardized)]


def _ws_cases(model: nn.Module, dtype: torch.dtype) -> dict[str, Case]:
    layers = ws_layers(model)
    weights = [layer.weight for layer in layers]
    cases = {
        'WS': standardizing(model, dtype),
        'WS, layer by layer': _ws_case(
            lambda: [layer.standardized_weight() for layer in layers], weights, dtype
        ),
    }
    by_hand: dict[str, Callable] = {'one-call WS': peers.one_call_standardize}
    if not peers.mmcv_missing():
        by_hand['mmcv ConvWS'] = peers.mmcv_standardize()
    for name, standardize in by_hand.items():
        cases[name] = _ws_case(
            functools.partial(_all_by_hand, standardize, weights, dtype), weights, dtype
        )
    return cases


def _all_by_hand(
    standardize: Callable, weights: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    return [standardize(w).to(dtype) for w in weights]


def standardizing(model: nn.Module, dtype: torch.dtype) -> Case:
    """All work that our WS layers do in one training step, without the convolutions."""
    layers = ws_layers(model)

    def forward() -> list[Tensor]:
        with standardized_once(model):
            return [layer.standardized_weight() for layer in layers]

    return _ws_case(forward, [layer.weight for layer in layers], dtype)


class _Use(torch.autograd.Function):
    """Uses weights, whose gradients are there already.

    One node for all: what stands in for the convolutions shall not be what is measured. A gradient
    that Python has seen is never overwritten, as a convolution's is: what is measured writes to
    other memory, and is a little more than a network pays.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *w_hats: Tensor) -> Tensor:
        ctx.gradients = gradients
        return w_hats[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients


def _ws_case(
    standardize: Callable[[], list[Tensor]], weights: Sequence[Tensor], dtype: torch.dtype
) -> Case:
    cotangents = [torch.randn_like(w, dtype=dtype) for w in weights]
    gradients: list[Tensor] = []

    def prepare() -> None:
        _clear_gradients(weights)
        gradients[:] = [cotangent.clone() for cotangent in cotangents]

    def forward() -> list[Tensor]:
        with peers.autocast(weights[0].device, dtype):
            return standardize()

    def backward(outputs: list[Tensor]) -> None:
        _Use.apply(gradients, *outputs).backward()

    return Case(forward, backward, prepare)


# ----------------------------------------------------------------------------------------------
# Backbone


def backbone(settings: Settings) -> Iterator[dict]:
    """A ResNet-50 on one image: a training step and a forward pass in evaluation.

    A step includes the optimizer's (SGD with momentum; its learning rate is 0, so that every step
    is the same one).
    """
    device = settings.device
    sizes = [(800, 1333)] if device.type == 'cuda' else [(160, 192), (256, 320), (512, 640)]
    sizes = [(64, 64)] if settings.quick else sizes
    for layout in settings.layouts:
        models = {}
        makers = peers.backbones(QUICK_WIDTH if settings.quick else WIDTH)
        if device.type == 'cuda':
            makers = {n: make for n, make in makers.items() if n not in peers.NOT_ON_GPU}
        for name, make in makers.items():
            torch.manual_seed(0)
            models[name] = make().to(device)
            standardize_once_per_forward(models[name])
            # mmcv's ConvWS raises with weights in channels_last; its activations can be.
            if not name.startswith('mmcv'):
                models[name].to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        for dtype in settings.dtypes:
            for size in sizes:
                title = f'backbone {size[0]}x{size[1]} {name_of(dtype)} {layout}'
                if not settings.begins(title):
                    continue
                row = dict(size=list(size), dtype=name_of(dtype), layout=layout)
                yield row | _time_backbones(settings, models, size, dtype, layout)


def _time_backbones(settings, models, size, dtype, layout) -> dict:
    device = settings.device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *size, generator=generator)
    image = image.to(device, memory_format=LAYOUTS[layout])
    row: dict = {}

    steps = {n: _training_step(m.train(), image, dtype) for n, m in models.items()}
    # In the same rounds: what our WS takes of a step.
    steps['WS alone'] = standardizing(models['WS + BCN'], dtype)
    training: dict[str, dict[str, Any]]
    # Steps vary: the host of a GPU has other things to do.
    rounds = 2 * settings.repeats if device.type == 'cuda' else settings.repeats
    training = dict(timing.round_robin(steps, device, rounds))
    alone = training.pop('WS alone')['both']
    timing.add_ratios(training, 'conv + GN')
    step, without = training['WS + BCN']['both']['ms'], training['conv + BCN']['both']['ms']
    row['ws_share'] = {'alone': alone['ms'] / step, 'by_difference': 1 - without / step}
    if device.type == 'cuda':
        host = gpu_timing.host({name: steps[name] for name in models}, 4 * settings.repeats)
        for name in models:
            training[name]['peak'] = timing.peak_bytes(steps[name])
            training[name]['host'] = host[name]
            training[name] |= gpu_timing.launched(steps[name], settings.repeats)

    compared = {n: m for n, m in models.items() if n != peers.FROZEN}  # is conv + BN there
    passes = {n: _evaluation(m.eval(), image, dtype) for n, m in compared.items()}
    held = {n: copy.deepcopy(m) for n, m in compared.items() if ws_layers(m)}
    passes |= {f'{n}{HELD}': _evaluation(m, image, dtype) for n, m in held.items()}
    with contextlib.ExitStack() as scopes:
        for model in held.values():
            scopes.enter_context(weights_do_not_change(model))
        evaluation = timing.round_robin(passes, device, settings.repeats)
    timing.add_ratios(evaluation, 'conv + GN')
    evaluation = {name: {'forward': phases['forward']} for name, phases in evaluation.items()}
    for model in models.values():  # gradients are not the next size's
        model.train().zero_grad()
    return row | dict(training=training, evaluation=evaluation)


def _training_step(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Case:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
    generator = torch.Generator(image.device).manual_seed(0)
    cotangents: list[Tensor] = []

    def forward() -> list[Tensor]:
        with peers.autocast(image.device, dtype):
            return model(image)

    def backward(outputs: list[Tensor]) -> None:
        torch.autograd.backward(outputs, cotangents)

    for y in forward():  # GroupNorm returns float32 under autocast: dtypes differ between models
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        cotangents.append(noise.to(y.dtype).contiguous(memory_format=_layout_of(y)))
    return Case(forward, backward, lambda: _clear_gradients(parameters), optimizer.step)


def _layout_of(y: Tensor) -> torch.memory_format:
    return torch.contiguous_format if y.is_contiguous() else torch.channels_last


def _evaluation(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Case:
    def forward() -> list[Tensor]:
        with torch.no_grad(), peers.autocast(image.device, dtype):
            return model(image)

    return Case(forward)
