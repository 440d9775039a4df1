"""The detector section: training steps of a Mask R-CNN from this project's configs.

On a GPU the COCO configs at 800x1333, in every precision; on a CPU the quick config on one drawn
image, in float32.
"""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmark import timing
from benchmark.settings import Settings, Skipped, name_of, show_progress
from benchmark.timing import Case
from wsbcn_mm import standardize_once_per_forward

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
QUICK_CONFIG = CONFIGS / 'quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'
COCO_CONFIG = 'mask_rcnn/mask-rcnn_r50_fpn_{}_8xb1-2x_coco.py'
COCO_SIZE = (800, 1333)
GROUP_NORM = dict(type='GN', num_groups=16, requires_grad=True)
MMCV_CONV = dict(conv_cfg=dict(type='ConvWS'))


class Variant(NamedTuple):
    """A config, and what is replaced wherever it stands in it."""

    config: Path
    layers: dict[str, Any]


def _coco(which: str, **layers: Any) -> Variant:
    return Variant(CONFIGS / COCO_CONFIG.format(which), layers)


FROZEN = 'frozen BN'
ON_CPU = {
    'GN': Variant(QUICK_CONFIG, dict(norm_cfg=GROUP_NORM, conv_cfg=None)),
    'mmcv ConvWS + GN': Variant(QUICK_CONFIG, dict(norm_cfg=GROUP_NORM, **MMCV_CONV)),
    'WS + BCN': Variant(QUICK_CONFIG, {}),
}
ON_GPU = {
    FROZEN: _coco('frozen-bn'),
    'GN': _coco('gn'),
    'mmcv ConvWS + GN': _coco('ws-gn', **MMCV_CONV),
    'WS + GN': _coco('ws-gn'),
    'WS + BCN': _coco('ws-bcn'),
}
"""`FROZEN` has the other configs' head of convolutions, without norms."""


def detector(settings: Settings) -> Iterator[dict]:
    """A training step, as the runner does it: losses, backward pass, gradient clipping, optimizer.

    The learning rate is 0, so that every step is the same step.
    """
    try:
        from wsbcn_mm.openmmlab import compat  # which needs mmengine

        compat.require('mmengine', 'mmcv', 'mmdet')
    except ImportError as error:
        raise Skipped(str(error).replace('\n', ';')) from None
    on_gpu = settings.device.type == 'cuda'
    variants = ON_GPU if on_gpu else ON_CPU
    size = COCO_SIZE if on_gpu else None
    models: dict[str, Any] = {}
    for dtype in settings.dtypes if on_gpu else [torch.float32]:
        if not settings.begins(f'detector {name_of(dtype)}'):
            continue
        for name, variant in variants.items():
            if name not in models:
                show_progress(f'detector: builds {name}')
                models[name] = _build(variant, settings.device)
        cases = {
            name: _step(model, cfg, _drawn_sample(size), dtype)
            for name, (model, cfg) in models.items()
        }
        show_progress(f'detector: {settings.repeats} rounds of {len(cases)}')
        times = timing.round_robin(cases, settings.device, settings.repeats, warm_up=2)
        timing.add_ratios(times, 'GN')
        found: dict[str, dict] = {name: {'step': t['forward']} for name, t in times.items()}
        if on_gpu:
            for name, case in cases.items():
                found[name]['peak'] = timing.peak_bytes(case)
        config = variants['WS + BCN'].config.name
        yield dict(config=config, size=size, dtype=name_of(dtype), peers=found)


def _build(variant: Variant, device: torch.device) -> tuple[Any, Any]:
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.logging import MMLogger

    from wsbcn_mm.openmmlab.config import load_config

    register_all_modules()
    MMLogger.get_current_instance().setLevel('WARNING')  # it writes to stdout
    cfg = load_config(str(variant.config))
    _replace(cfg.model, variant.layers)
    cfg.model.backbone.init_cfg = None  # nothing is downloaded
    cfg.optim_wrapper.optimizer.lr = 0.0
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).to(device).train()
    standardize_once_per_forward(model)  # as a hook of every config does
    return model, cfg


def _step(model: Any, cfg: Any, sample: dict, dtype: torch.dtype) -> Case:
    from mmengine.optim import build_optim_wrapper

    wrapper = copy.deepcopy(cfg.optim_wrapper)
    if dtype != torch.float32:
        # A loss scale that never overflows: a step that is skipped is a shorter one.
        wrapper.update(type='AmpOptimWrapper', dtype=name_of(dtype), loss_scale=1.0)
    optimizer = build_optim_wrapper(model, wrapper)
    data: dict = {}

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


@functools.cache
def _drawn_sample(size: tuple[int, int] | None) -> dict:
    """One drawn image with its instances, enlarged to a size."""
    import cv2
    import numpy as np
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    from wsbcn_mm import shapes

    image, instances = shapes.draw_image('train', 0)
    height, width = size or image.shape[:2]

    def enlarged(array: Any) -> Any:
        return cv2.resize(array, (width, height), interpolation=cv2.INTER_NEAREST)

    masks = np.stack([enlarged(mask.astype(np.uint8)) for _, mask in instances])
    instance_masks = BitmapMasks(masks, height, width)
    labels = torch.tensor([label for label, _ in instances])
    shape = (height, width)
    sample = DetDataSample(metainfo=dict(img_shape=shape, ori_shape=shape, scale_factor=(1.0, 1.0)))
    sample.gt_instances = InstanceData(
        masks=instance_masks, bboxes=instance_masks.get_bboxes('hbox'), labels=labels
    )
    bgr = np.ascontiguousarray(enlarged(image)[..., ::-1].transpose(2, 0, 1))
    return dict(inputs=[torch.from_numpy(bgr)], data_samples=[sample])
