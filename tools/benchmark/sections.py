"""The sections: host time, norms alone, weight standardization alone, a backbone, a detector.

Each takes `Settings` and returns what goes into results.json under its name; a `Skipped` says why
there is nothing to return.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmark import peers, timing
from benchmark.gate import LAYOUTS
from benchmark.host_time import host as host
from benchmark.settings import Settings, Skipped, name_of, show_progress
from benchmark.timing import Case
from wsbcn_mm import (
    WSConv2d,
    standardize_once_per_forward,
    standardized_once,
    weights_do_not_change,
)
from wsbcn_mm.layers import WeightStandardized

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK_CONFIG = REPOSITORY / 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'

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
CUDA_SHAPES = ((8, 256, 200, 336),)  # over 256 MB in half precision too: out of every cache
QUICK_SHAPES = ((1, 64, 8, 8), (2, 64, 5, 6))
HELD = ', weights held'  # in evaluation, within `weights_do_not_change`
WIDTH, QUICK_WIDTH = 64, 32  # of the ResNet

# Reads and writes of tensors as large as x that a norm cannot do without, for it needs the
# statistics before it can normalise: forward reads x twice and writes y; backward reads x and the
# gradient of y twice and writes the gradient of x.
PASSES = {'forward': 3, 'backward': 5, 'both': 8}


# ----------------------------------------------------------------------------------------------
# Norms


def norm(settings: Settings) -> list[dict]:
    """Every norm of `peers.NORMS` at every shape, dtype and layout."""
    device = settings.device
    shapes = SHAPES + (CUDA_SHAPES if device.type == 'cuda' else ())
    shapes = QUICK_SHAPES if settings.quick else shapes
    bandwidth = timing.copy_bandwidth(device, settings.repeats)
    show_progress(f'copy bandwidth {bandwidth / 1e9:.1f} GB/s')
    kinds = [(d, layout) for d in settings.dtypes for layout in settings.layouts]
    rows: list[dict] = []
    for dtype, layout in kinds:
        for shape in shapes:
            if not settings.begins(f'norm {shape} {name_of(dtype)} {layout}'):
                continue
            row = dict(shape=list(shape), dtype=name_of(dtype), layout=layout)
            rows.append(row | _time_norms(settings, shape, dtype, layout, bandwidth))
    return rows


def _time_norms(settings, shape, dtype, layout, bandwidth) -> dict:
    device = settings.device
    generator = torch.Generator().manual_seed(0)
    x, cotangent = (
        torch.randn(shape, generator=generator).to(device, dtype, memory_format=LAYOUTS[layout])
        for _ in range(2)
    )
    x = (x + 1).requires_grad_()
    modules = peers.norms(shape[1], device, dtype)
    cases = {name: _norm_case(module, x, cotangent) for name, module in modules.items()}
    times: Any = timing.round_robin(cases, device, settings.repeats)
    timing.add_ratios(times, 'GN')
    size = x.numel() * x.element_size()
    for name, module in modules.items():
        times[name]['saved'] = timing.saved_bytes(_then_relu(module, x), module) / size
        if device.type == 'cuda':
            times[name]['peak'] = timing.peak_bytes(cases[name]) / size
    share = {
        phase: passes * size / (times['BCN'][phase]['ms'] / 1e3) / bandwidth
        for phase, passes in PASSES.items()
    }
    return dict(bytes=size, peers=times, copy_bandwidth=bandwidth, share_of_copy_bandwidth=share)


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


def ws(settings: Settings) -> list[dict]:
    """Standardizing all weights of a ResNet-50, forward and backward, in every dtype.

    Weights are float32; in half precision the result is cast as autocast would do it. Against what
    the copy bandwidth allows: each weight read and written once, then gradient and weight read and
    the gradient of the weight written.
    """
    bandwidth = timing.copy_bandwidth(settings.device, settings.repeats)
    rows: list[dict] = []
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
        rows.append(
            dict(
                dtype=name_of(dtype),
                peers=times,
                copy_bandwidth=bandwidth,
                limit_ms=moved / bandwidth * 1e3,
            )
        )
    return rows


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
    """A use of a weight whose gradient is there already, and, as a convolution's, nobody else's."""

    @staticmethod
    def forward(ctx: Any, w_hat: Tensor, gradients: list[Tensor]) -> Tensor:
        ctx.gradients = gradients
        return w_hat.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.gradients.pop(), None


def _ws_case(
    standardize: Callable[[], list[Tensor]], weights: Sequence[Tensor], dtype: torch.dtype
) -> Case:
    cotangents = [torch.randn_like(w, dtype=dtype) for w in weights]
    gradients: list[list[Tensor]] = [[] for _ in weights]

    def prepare() -> None:
        _clear_gradients(weights)
        for box, cotangent in zip(gradients, cotangents):
            box[:] = [cotangent.clone()]

    def forward() -> list[Tensor]:
        with peers.autocast(weights[0].device, dtype):
            return standardize()

    def backward(outputs: list[Tensor]) -> None:
        uses = [_Use.apply(w_hat, box) for w_hat, box in zip(outputs, gradients)]
        torch.stack(uses).sum().backward()

    return Case(forward, backward, prepare)


# ----------------------------------------------------------------------------------------------
# Backbone


def backbone(settings: Settings) -> list[dict]:
    """A ResNet-50 on one image: a training step and a forward pass in evaluation.

    A step includes the optimizer's (SGD with momentum; its learning rate is 0, so that every step
    is the same one).
    """
    device = settings.device
    sizes = [(800, 1333)] if device.type == 'cuda' else [(160, 192), (256, 320), (512, 640)]
    sizes = [(64, 64)] if settings.quick else sizes
    rows: list[dict] = []
    for layout in settings.layouts:
        models = {}
        makers = peers.backbones(QUICK_WIDTH if settings.quick else WIDTH)
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
                rows.append(row | _time_backbones(settings, models, size, dtype, layout))
    return rows


def _time_backbones(settings, models, size, dtype, layout) -> dict:
    device = settings.device
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *size, generator=generator)
    image = image.to(device, memory_format=LAYOUTS[layout])
    row: dict = {}

    steps = {n: _training_step(m.train(), image, dtype) for n, m in models.items()}
    # In the same rounds: what our WS takes of a step.
    steps['WS alone'] = standardizing(models['WS + BCN'], dtype)
    training = timing.round_robin(steps, device, settings.repeats)
    alone = training.pop('WS alone')['both']
    timing.add_ratios(training, 'conv + GN')
    step, without = training['WS + BCN']['both']['ms'], training['conv + BCN']['both']['ms']
    row['ws_share'] = {'alone': alone['ms'] / step, 'by_difference': 1 - without / step}
    if device.type == 'cuda':
        for name, model in models.items():
            own = sum(t.numel() * t.element_size() for t in model.state_dict().values())
            training[name]['peak'] = own + timing.peak_bytes(steps[name])

    passes = {n: _evaluation(m.eval(), image, dtype) for n, m in models.items()}
    held = {n: copy.deepcopy(m) for n, m in models.items() if ws_layers(m)}
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
        optimizer.step()

    for y in forward():  # GroupNorm returns float32 under autocast: dtypes differ between models
        noise = torch.randn(y.shape, generator=generator, device=y.device)
        cotangents.append(noise.to(y.dtype).contiguous(memory_format=_layout_of(y)))
    return Case(forward, backward, lambda: _clear_gradients(parameters))


def _layout_of(y: Tensor) -> torch.memory_format:
    return torch.contiguous_format if y.is_contiguous() else torch.channels_last


def _evaluation(model: nn.Module, image: Tensor, dtype: torch.dtype) -> Case:
    def forward() -> list[Tensor]:
        with torch.no_grad(), peers.autocast(image.device, dtype):
            return model(image)

    return Case(forward)


# ----------------------------------------------------------------------------------------------
# Detector


def detector(settings: Settings) -> dict:
    """A training step of the quick config's Mask R-CNN on one drawn image, in float32.

    As the runner does it: losses, backward pass, gradient clipping, AdamW. The learning rate is 0,
    so that every step is the same step.
    """
    from wsbcn_mm.openmmlab import compat

    try:
        compat.require('mmengine', 'mmcv', 'mmdet')
    except ImportError as error:
        raise Skipped(str(error).replace('\n', ';')) from None
    group_norm = dict(type='GN', num_groups=16, requires_grad=True)
    if not settings.begins('detector'):
        raise Skipped('no time was left')
    variants: dict[str, dict] = {
        'GN': dict(norm_cfg=group_norm, conv_cfg=None),
        'mmcv ConvWS + GN': dict(norm_cfg=group_norm, conv_cfg=dict(type='ConvWS')),
        'WS + BCN': {},  # the config as it is
    }
    cases: dict[str, Case] = {}
    for name, layers in variants.items():
        show_progress(f'detector: builds {name}')
        cases[name] = _detector_step(layers, settings.device)
    show_progress(f'detector: {settings.repeats} steps of each')
    times = timing.round_robin(cases, settings.device, settings.repeats, warm_up=1)
    timing.add_ratios(times, 'GN')
    times = {name: {'step': phases['forward']} for name, phases in times.items()}
    return dict(config=QUICK_CONFIG.name, peers=times)


def _detector_step(layers: dict, device: torch.device) -> Case:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger
    from mmengine.optim import build_optim_wrapper

    from wsbcn_mm.openmmlab.config import load_config

    register_all_modules()
    MMLogger.get_current_instance().setLevel('WARNING')  # it writes to stdout
    cfg = load_config(str(QUICK_CONFIG))
    _replace(cfg.model, layers)
    cfg.optim_wrapper.optimizer.lr = 0.0
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
    sample, data = _drawn_sample(), {}

    def prepare() -> None:
        torch.manual_seed(0)  # heads sample at random
        data.update(copy.deepcopy(sample))  # models edit their data

    return Case(lambda: model.train_step(data, optimizer), prepare=prepare)


def _replace(cfg: dict, values: dict) -> None:
    """Sets the given keys wherever a config has them."""
    for key, value in list(cfg.items()):
        if key in values:
            cfg[key] = values[key]
        elif isinstance(value, dict):
            _replace(value, values)


def _drawn_sample() -> dict:
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    from wsbcn_mm import shapes

    image, instances = shapes.draw_image('train', 0)
    size = image.shape[:2]
    masks = BitmapMasks(np.stack([mask for _, mask in instances]).astype(np.uint8), *size)
    labels = torch.tensor([label for label, _ in instances])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(masks=masks, bboxes=masks.get_bboxes('hbox'), labels=labels)
    bgr = np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))
    return dict(inputs=[torch.from_numpy(bgr)], data_samples=[sample])
