"""Small models of other libraries, and what becomes of each of them.

`tools/dev/sweep_libraries.py` makes the table of docs/compatibility.md from them; a dozen go
through the tests where their libraries are installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from wsbcn_mm import fold
from wsbcn_mm.convert import ConversionReport, convert_model
from wsbcn_mm.structure import followers

Maker = Callable[[], nn.Module]
IMAGES = 2


@dataclass(frozen=True)
class Model:
    """A model and what it is called with.

    Attributes:
        library: The name it is imported by.
        name: Of the model.
        make: Builds it, without weights of somebody's.
        shape: Of one input, without the number of images.
        detects: Takes a list of images, and targets in training (torchvision's detectors).
    """

    library: str
    name: str
    make: Maker
    shape: tuple[int, ...] = (3, 64, 64)
    detects: bool = False

    def arguments(self, training: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        """Of one call with two images."""
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(IMAGES, *self.shape, generator=generator).to(dtype)
        if not self.detects:
            return (x,)
        images = list(x)
        if not training:
            return (images,)
        boxes = torch.tensor([[8.0, 8, 40, 40]], dtype=dtype)
        return images, [dict(boxes=boxes, labels=torch.ones(1, dtype=torch.long)) for _ in images]


@dataclass
class Outcome:
    """What became of a model.

    Attributes:
        report: Of its conversion.
        kept: Convolutions in front of a norm that do not standardize, with the reason.
        loss: Of the second step.
        error: The largest relative difference between the folded model and it, in float64.
    """

    report: ConversionReport
    kept: dict[str, str]
    loss: float
    error: float


def examine(model: Model) -> Outcome:
    """Converts with an example, trains two steps at two images, evaluates, folds."""
    torch.manual_seed(0)
    network = model.make()
    report = convert_model(network, model.arguments(False))
    normalised = {
        f.names[0] for f in followers(network, lambda: _evaluate(network, model)) if f.norms
    }
    kept = {
        line.name: line.reason
        for line in report.left
        if line.name in normalised and not line.reason.startswith('not only a normalisation')
    }
    loss = _train(network, model)
    network.double().eval()
    expected = _numbers(_evaluate(network, model, torch.float64))
    folded = fold(network, run=lambda m: _evaluate(m, model, torch.float64))
    found = _numbers(_evaluate(folded, model, torch.float64))
    if len(found) != len(expected):
        raise RuntimeError('the folded model finds something else')
    return Outcome(report, kept, loss, max(map(_difference, found, expected), default=0.0))


def _train(network: nn.Module, model: Model) -> float:
    optimizer = torch.optim.SGD(network.parameters(), 1e-3)
    network.train()
    loss = torch.zeros(())
    for _ in range(2):
        outputs = _numbers(network(*model.arguments(True)))
        loss = sum((o.square().mean() for o in outputs if o.requires_grad), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not loss.isfinite():
        raise FloatingPointError(f'the loss is {loss.item()}')
    return loss.item()


@torch.no_grad()
def _evaluate(network: nn.Module, model: Model, dtype: torch.dtype = torch.float32) -> Any:
    network.eval()
    return network(*model.arguments(False, dtype))


def _numbers(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point() and v.numel()]


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise RuntimeError('the folded model finds something else')
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


# ---- the models --------------------------------------------------------------------------------


def timm_model(name: str, size: int = 64) -> Model:
    """One of timm, by its name."""

    def make() -> nn.Module:
        return importlib.import_module('timm').create_model(name, num_classes=5)

    return Model('timm', name, make, (3, size, size))


def _of(library: str, place: str, shape: tuple[int, ...] = (3, 64, 64), **arguments: Any) -> Model:
    """What a function or class of a library makes; ``place``: 'module:name'."""
    module, _, name = place.partition(':')
    detects = arguments.pop('detects', False)
    shown = ', '.join(f'{v}' for v in arguments.values() if isinstance(v, str) and v)

    def make() -> nn.Module:
        return getattr(importlib.import_module(f'{library}{module}'), name)(**arguments)

    return Model(library, f'{name} ({shown})' if shown else name, make, shape, detects)


def torchvision_model(
    name: str, shape: tuple[int, ...] = (3, 64, 64), detects: bool = False
) -> Model:
    """One of torchvision, by its name."""

    def make() -> nn.Module:
        get_model = importlib.import_module('torchvision.models').get_model
        arguments: dict[str, Any] = dict(weights=None)
        if detects or 'deeplab' in name or 'lraspp' in name:
            arguments['weights_backbone'] = None
        if detects:
            arguments |= dict(num_classes=3, min_size=64, max_size=64)
        return get_model(name, **arguments)

    return Model('torchvision', name, make, shape, detects)


def yolo(name: str) -> Model:
    """One of ultralytics, by the name of its config."""

    def make() -> nn.Module:
        tasks = importlib.import_module('ultralytics.nn.tasks')
        kinds = {'cls': 'ClassificationModel', 'seg': 'SegmentationModel'}
        kind = kinds.get(name.rpartition('-')[2], 'DetectionModel')
        return getattr(tasks, kind)(f'{name}.yaml', verbose=False)

    return Model('ultralytics', name, make)


SMP, VOLUME = 'segmentation_models_pytorch', (1, 32, 32, 32)
_SMALL: dict[str, Any] = dict(encoder_name='resnet18', encoder_weights=None)
_UNET: dict[str, Any] = dict(
    in_channels=1,
    out_channels=2,
    channels=(4, 8, 16),
    strides=(2, 2),
    num_res_units=1,
    norm='batch',
)
# The first of each library are those of the tests.
MODELS = [
    timm_model('tf_efficientnet_lite0'),
    timm_model('poolformer_s12'),
    timm_model('repvgg_a0'),
    *map(
        timm_model,
        [
            *('resnet10t', 'resnet14t', 'mobilenetv3_small_050', 'regnetx_002', 'mobileone_s0'),
            *('ghostnet_050', 'densenet121', 'mixnet_s', 'tf_mixnet_s', 'lcnet_050', 'dla46_c'),
            *('efficientvit_b0', 'fastvit_t8', 'convnext_atto', 'poolformerv2_s12'),
            *('skresnet18', 'tinynet_e', 'mobilenetv4_conv_small_050', 'resnetv2_18d'),
        ],
    ),
    torchvision_model('r3d_18', (3, 4, 32, 32)),
    torchvision_model('mobilenet_v3_small'),
    torchvision_model('fasterrcnn_mobilenet_v3_large_320_fpn', detects=True),
    *map(
        torchvision_model,
        [
            *('resnet18', 'mobilenet_v2', 'shufflenet_v2_x0_5', 'densenet121', 'mnasnet0_5'),
            *('efficientnet_b0', 'regnet_y_400mf', 'lraspp_mobilenet_v3_large', 'squeezenet1_1'),
        ],
    ),
    torchvision_model('mc3_18', (3, 4, 32, 32)),
    torchvision_model('r2plus1d_18', (3, 4, 32, 32)),
    _of(SMP, ':Unet', encoder_name='efficientnet-b0', encoder_weights=None),
    _of(SMP, ':DeepLabV3Plus', **_SMALL),
    _of(SMP, ':Unet', **_SMALL),
    _of(SMP, ':Unet', encoder_name='timm-mobilenetv3_small_minimal_100', encoder_weights=None),
    *(
        _of(SMP, f':{name}', **_SMALL)
        for name in ('UnetPlusPlus', 'FPN', 'PSPNet', 'Linknet', 'MAnet', 'DeepLabV3', 'UPerNet')
    ),
    yolo('yolov8n'),
    yolo('yolo11n-seg'),
    yolo('yolov8n-cls'),
    *map(yolo, ['yolov5nu', 'yolov9t', 'yolov10n', 'yolo11n', 'yolo12n']),
    _of('monai', '.networks.nets:UNet', VOLUME, spatial_dims=3, **_UNET),
    _of('monai', '.networks.nets:VNet', VOLUME, spatial_dims=3),
    _of('monai', '.networks.nets:SegResNet', VOLUME, spatial_dims=3),
    _of('monai', '.networks.nets:UNet', (1, 64), spatial_dims=1, **_UNET),
    _of('monai', '.networks.nets:UNet', (1, 64, 64), spatial_dims=2, **_UNET),
    _of(
        'monai',
        '.networks.nets:DenseNet121',
        (1, 64, 64),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
    ),
    _of(
        'monai',
        '.networks.nets:BasicUNet',
        (1, 64, 64),
        spatial_dims=2,
        features=(4, 4, 8, 8, 8, 4),
        norm='batch',
    ),
    _of('monai', '.networks.nets:resnet10', VOLUME, spatial_dims=3, n_input_channels=1),
]
LIBRARIES = tuple(dict.fromkeys(model.library for model in MODELS))
