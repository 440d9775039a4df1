"""Instance segmentation as a user has it: MMDetection's Mask R-CNN, converted, on few images.

Persons in a subset of COCO, on EfficientNet-Lite0 with its ImageNet weights: what becomes of them
is the route that is compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import load_config

SOURCE = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
CHANNELS = 64  # of pyramid and heads
VAL_IMAGES = 100
CLASSES = ('person',)


def source(root: Path, folder: Path, run: dict[str, Any], weights: Path) -> Config:
    """MMDetection's config as somebody changes it for a small data set and a small machine.

    Args:
        root: ``coco_subset``.
        folder: For the annotations of the validation images that are used.
        run: ``crop``: the long side of images; ``steps``.
        weights: Of EfficientNet-Lite0.
    """
    cfg = load_config(SOURCE)
    model, heads = cfg.model, cfg.model.roi_head
    model.backbone = dict(
        type='EfficientNetLite0',
        out_indices=(2, 4, 6),
        norm_cfg=dict(type='BN', eps=1e-3),
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint=str(weights)),
    )
    model.data_preprocessor.update(mean=[127.0] * 3, std=[128.0] * 3)
    model.neck.update(in_channels=[40, 112, 320], out_channels=CHANNELS, num_outs=4)
    model.neck.norm_cfg = dict(type='BN')
    model.rpn_head.update(in_channels=CHANNELS, feat_channels=CHANNELS)
    model.rpn_head.anchor_generator.update(scales=[4], strides=[8, 16, 32, 64])
    for kind in ('bbox', 'mask'):
        heads[f'{kind}_roi_extractor'].update(out_channels=CHANNELS, featmap_strides=[8, 16, 32])
    heads.bbox_head.update(
        type='Shared4Conv1FCBBoxHead',
        in_channels=CHANNELS,
        conv_out_channels=CHANNELS,
        fc_out_channels=256,
        num_classes=1,
        norm_cfg=dict(type='BN'),
    )
    heads.mask_head.update(
        in_channels=CHANNELS,
        conv_out_channels=CHANNELS,
        num_convs=2,
        num_classes=1,
        norm_cfg=dict(type='BN'),
    )
    model.train_cfg.rpn_proposal.update(nms_pre=500, max_per_img=200)
    model.train_cfg.rcnn.sampler.update(num=64)
    model.test_cfg.rpn.update(nms_pre=500, max_per_img=100)
    _data(cfg, root, folder, run['crop'])
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=run['steps'], val_begin=run['steps'] + 1
    )
    steps = run['steps']
    warm_up = min(100, steps // 4)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
        dict(type='PolyLR', power=0.9, by_epoch=False, begin=warm_up, end=steps),
    ]
    cfg.optim_wrapper.clip_grad = dict(max_norm=10)
    cfg.log_processor = dict(by_epoch=False)
    return cfg


def _data(cfg: Config, root: Path, folder: Path, side: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    val = json.loads((root / 'val_person.json').read_text())
    val['images'] = val['images'][:VAL_IMAGES]
    ids = {image['id'] for image in val['images']}
    val['annotations'] = [a for a in val['annotations'] if a['image_id'] in ids]
    (folder / 'val.json').write_text(json.dumps(val))
    resize = dict(type='Resize', scale=(side, side), keep_ratio=True)
    train = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        resize,
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackDetInputs'),
    ]
    meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    test = [
        dict(type='LoadImageFromFile'),
        resize,
        dict(type='PackDetInputs', meta_keys=meta),
    ]
    files = dict(train=root / 'train_person.json', val=folder / 'val.json')
    for split, pipeline in (('train', train), ('val', test)):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root=str(root),
            ann_file=str(files[split]),
            data_prefix=dict(img='images/'),
            metainfo=dict(classes=CLASSES),
            pipeline=pipeline,
        )
    cfg.test_dataloader = cfg.val_dataloader
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(files['val'])
