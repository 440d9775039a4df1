"""What a training does with a network: build it, initialise it, one step, one evaluation.

With random images and made-up annotations of every kind (boxes, masks, classes of pixels, edges):
a model takes those that it knows.
"""

import copy
import functools
import importlib
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from wsbcn_mm.layers import WeightStandardized
from wsbcn_mm.openmmlab.config import model_of, type_name
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.deploy import clips
from wsbcn_mm.openmmlab.deploy.settings import dicts, drop_pretrained
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.structure import trace

STAGES = ('built', 'initialised', 'trained', 'evaluated')
OK, NOT_REACHED = 'ok', 'not reached'
SIZES = (64, 256, 512)  # pixels of an image: the next where one is too small
SIZES_OF_CLIPS = (64, 112, 224)


@dataclass
class Trial:
    """What became of a network.

    Attributes:
        built, initialised, trained, evaluated: `OK`, why it failed, or `NOT_REACHED`.
        size: Pixels of the images of the step.
        without_norm: Names of WS convolutions whose output something else than a norm read.
    """

    built: str = NOT_REACHED
    initialised: str = NOT_REACHED
    trained: str = NOT_REACHED
    evaluated: str = NOT_REACHED
    size: int | None = None
    without_norm: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def try_network(cfg: Config, images: int) -> Trial:
    """Goes through the four stages with a config's model; nothing is downloaded.

    Args:
        cfg: The config; not changed.
        images: In the batch of the step and of the evaluation.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model = model_of(cfg)
    _in_small(cfg)
    trial = Trial()
    probe.register_hosts(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        drop_pretrained(cfg.model)
        model = _stage(trial, 'built', lambda: revert_sync_batchnorm(MODELS.build(cfg.model)))
        if model is None:
            return trial
        _stage(trial, 'initialised', model.init_weights)
        if trial.initialised != OK:
            return trial
        for size in _sizes(cfg):
            trial.size, data = size, batch(cfg, images, size)
            step = functools.partial(_train_step, model, data)
            trial.without_norm = _stage(trial, 'trained', step) or []
            if trial.trained == OK:
                data = batch(cfg, images, size)  # the other one was padded for training
                _stage(trial, 'evaluated', functools.partial(_evaluate, model, data))
            if trial.evaluated == OK:
                break
    return trial


def _stage(trial: Trial, name: str, run: Callable[[], Any]) -> Any:
    """Runs a stage and records what comes of it; its result, None where it failed."""
    try:
        result = run()
    except Exception as error:  # noqa: BLE001  whatever a model raises is what is recorded
        setattr(trial, name, reason_of(error))
        return None
    setattr(trial, name, OK)
    return result


def reason_of(error: BaseException) -> str:
    """Class and first line of an error, without the places of this machine."""
    line = ' '.join(f'{type(error).__name__}: {first_line(error)}'.split())
    line = re.sub(r'/\S*/site-packages/', '', line)
    return re.sub(r'(?<![\w./:])/(?:[^\s/]+/)+', '', line)[:200]


def _in_small(cfg: Config) -> None:
    """Few proposals, images at their own size, no synchronisation between processes."""
    for part in dicts(cfg.model):
        if part.get('type') in probe.SAME_LAYER:
            part['type'] = probe.SAME_LAYER[part['type']]
        for key in ('rpn', 'rpn_proposal'):
            if isinstance(part.get(key), dict) and 'max_per_img' in part[key]:
                part[key]['max_per_img'] = part[key]['nms_pre'] = 8
    preprocessor = cfg.model.get('data_preprocessor')
    if preprocessor is not None:
        preprocessor.pop('batch_augments', None)
        if preprocessor.pop('size', None) is not None:
            preprocessor['size_divisor'] = 32


def _sizes(cfg: Config) -> list[int]:
    """Those to try; a vision transformer may know positions of one size alone."""
    own = (cfg.model.get('backbone') or {}).get('img_size')
    own = own[0] if isinstance(own, (list, tuple)) else own
    sizes = SIZES_OF_CLIPS if cfg.get('default_scope') == 'mmaction' else SIZES
    return [sizes[0], own] if own else list(sizes)


# ---- step and evaluation -----------------------------------------------------------------------


def _train_step(model: Any, data: dict[str, Any]) -> list[str]:
    """A step of SGD; returns the WS convolutions whose output something else than a norm read."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    model.train()
    batch = model.data_preprocessor(data, True)
    losses: dict[str, Any] = {}
    seen = trace(model, lambda: losses.update(model(**batch, mode='loss')))
    loss, _ = model.parse_losses(losses)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f'the loss is {loss.item()}')
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [
        names[key]
        for key, (norms, others) in seen.items()
        if isinstance(modules[names[key]], WeightStandardized) and (others or not norms)
    ]


@torch.no_grad()
def _evaluate(model: Any, data: dict[str, Any]) -> None:
    model.eval()
    samples = model.test_step(data)
    if len(samples) != len(data['inputs']):
        raise RuntimeError(f'{len(samples)} results for {len(data["inputs"])} images')


# ---- data --------------------------------------------------------------------------------------


def batch(cfg: Config, images: int, size: int) -> dict[str, Any]:
    """What a data loader gives: random images or clips, and annotations of every kind."""
    scope = cfg.get('default_scope')
    channels = (cfg.model.get('backbone') or {}).get('in_channels', 3)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randint(0, 256, (channels, size, size), generator=generator, dtype=torch.uint8)
        for _ in range(images)
    ]
    if scope == 'mmaction':
        frames = [image.permute(1, 2, 0).numpy() for image in inputs]
        inputs = [clips.inputs_of(cfg, frame) for frame in frames]
    if scope in ('mmaction', 'mmpretrain'):
        samples = [_label(scope) for _ in range(images)]
    elif scope == 'mmdet':
        stride, masks = _stride_of_classes(cfg), _has_masks(cfg)
        samples = [_detection(size, stride, masks) for _ in range(images)]
    else:
        samples = [_segmentation(size) for _ in range(images)]
    return dict(inputs=inputs, data_samples=samples)


def _meta(size: int) -> dict[str, Any]:
    shape = (size, size)
    return dict(
        img_id=0,
        img_path='',
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
        flip=False,
        flip_direction=None,
        border=[0, size, 0, size],  # of CornerNet's kin
    )


def _pixels(size: int) -> Tensor:
    """Two classes: one above, one below."""
    classes = torch.zeros(1, size, size, dtype=torch.long)
    classes[:, size // 2 :] = 1
    return classes


def _stride_of_classes(cfg: Config) -> int:
    """Pixels of the image per pixel of the map of classes, where a detector learns one."""
    scales = [s['scale_factor'] for s in _pipeline(cfg) if type_name(s) == 'SegRescale']
    return round(1 / scales[0]) if scales else 1


def _has_masks(cfg: Config) -> bool:
    """Whether the training data have masks: some losses change where they are there."""
    return any(s.get('with_mask') or 'Panoptic' in type_name(s) for s in _pipeline(cfg))


def _pipeline(cfg: Config) -> list[dict[str, Any]]:
    return list(dicts((cfg.get('train_dataloader') or {}).get('dataset') or {}))


def _detection(size: int, stride: int, with_masks: bool) -> Any:
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.5, 0.9, 0.9]]) * size
    masks = np.zeros((2, size, size), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
        mask[y1:y2, x1:x2] = 1
    sample = DetDataSample(metainfo=_meta(size))
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.zeros(2, dtype=torch.long))
    if with_masks:
        sample.gt_instances.masks = BitmapMasks(masks, size, size)
    sample.ignored_instances = InstanceData(bboxes=boxes[:0])
    sample.proposals = InstanceData(bboxes=boxes)
    sample.gt_sem_seg = PixelData(sem_seg=_pixels(size)[:, ::stride, ::stride].byte())
    return sample


def _label(scope: str) -> Any:
    kind = dict(mmaction='ActionDataSample', mmpretrain='DataSample')[scope]
    return getattr(importlib.import_module(f'{scope}.structures'), kind)().set_gt_label(1)


def _segmentation(size: int) -> Any:
    from mmseg.structures import SegDataSample

    sample = SegDataSample(metainfo=_meta(size))
    sample.gt_sem_seg = PixelData(data=_pixels(size))
    sample.gt_edge_map = PixelData(data=_pixels(size).byte())
    sample.gt_depth_map = PixelData(data=_pixels(size).float() + 1)
    return sample
