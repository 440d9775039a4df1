"""The models that tests of deployment fold: two of the quick configs, two that must list layers."""

import contextlib
import importlib.util
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import mmdet.models.backbones.resnet
import mmseg.models.backbones.resnet
from torch import nn

from wsbcn_mm import shapes
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.openmmlab.deploy import inference
from wsbcn_mm.openmmlab.deploy.parts import relative_error, tensor_parts

ROOT = Path(__file__).parents[3]
QUICK = {
    'mask_rcnn': ROOT / 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py',
    'deeplabv3': ROOT / 'configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py',
}
EACH = pytest.mark.parametrize('name', list(QUICK))
SIZE = (64, 96)
# What no settings of stock layers can express: pyramid levels with norms of their own behind shared
# convolutions, and numbers of groups that differ within a part. Written to files, with their data.
LISTED = {
    'retinanet': f"""
default_scope = 'mmdet'
custom_imports = dict(imports=['wsbcn_mm'])
norm_cfg, conv_cfg = dict(type='BCN', num_groups='auto'), dict(type='WSConv2d')
model = dict(
    type='RetinaNet',
    data_preprocessor=dict(
        type='DetDataPreprocessor', mean=[120.0, 110.0, 100.0], std=[60.0, 50.0, 40.0],
        bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(type='ResNet', depth=18, base_channels=8, out_indices=(2, 3),
                  norm_cfg=norm_cfg, conv_cfg=conv_cfg),
    neck=dict(type='FPN', in_channels=[32, 64], out_channels=8, num_outs=3, norm_cfg=norm_cfg,
              conv_cfg=conv_cfg),
    bbox_head=dict(
        type='RetinaSepBNHead', num_classes=5, num_ins=3, in_channels=8, feat_channels=8,
        stacked_convs=2, norm_cfg=norm_cfg, conv_cfg=conv_cfg,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, ratios=[1.0],
                              scales_per_octave=1, strides=[16, 32, 64])),
    test_cfg=dict(nms_pre=10, score_thr=0.05, nms=dict(type='nms', iou_threshold=0.5),
                  max_per_img=5))
ann_file = 'data/coco/annotations/instances_val2017.json'
test_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='CocoDataset', data_root='data/coco/', ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'), test_mode=True,
        metainfo=dict(classes={shapes.CLASSES!r}),
        pipeline=[
            dict(type='LoadImageFromFile'), dict(type='Resize', scale=(96, 64)),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs', meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]))
test_evaluator, test_cfg = dict(type='CocoMetric', ann_file=ann_file), dict(type='TestLoop')
""",
    'segmenter': f"""
_base_ = {str(QUICK['deeplabv3'])!r}
custom_imports = dict(imports=['wsbcn_mm'])
norm_cfg = dict(type='BCN', num_groups='auto')
model = dict(backbone=dict(base_channels=8, norm_cfg=norm_cfg),
             decode_head=dict(in_channels=32, channels=16, norm_cfg=norm_cfg),
             auxiliary_head=dict(in_channels=16, channels=16, norm_cfg=norm_cfg))
test_dataloader = dict(dataset=dict(
    _delete_=True, type='BaseSegDataset', data_root='data/VOCdevkit/VOC2012',
    ann_file='ImageSets/Segmentation/val.txt', img_suffix='.jpg', seg_map_suffix='.png',
    data_prefix=dict(img_path='JPEGImages', seg_map_path='SegmentationClass'),
    metainfo=dict(classes={('background', *shapes.CLASSES)!r}, palette={shapes.PALETTE!r}),
    pipeline={{{{_base_.test_pipeline}}}}))
""",
}


@contextlib.contextmanager
def one_block_per_stage():
    with contextlib.ExitStack() as patches:
        for host in (mmdet, mmseg):
            resnet = host.models.backbones.resnet
            short = {18: (resnet.BasicBlock, (1, 1, 1, 1))}
            patches.enter_context(mock.patch.dict(resnet.ResNet.arch_settings, short))
        yield


def as_trained(model):
    """Statistics and affines far from their initial values."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 5)
        if isinstance(module, BatchChannelNorm):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 1, 0.3)
    return model


def image_of(model, cfg, size=SIZE):
    return inference.preprocess(model, cfg, inference.random_image(*size))


def error(model, other, x):
    """The largest relative error of another model's tensor parts on a normalised image."""
    expected = tensor_parts(model, x)
    return relative_error(expected, tensor_parts(other, x))


def our_layers(model):
    return [n for n, m in model.named_modules() if type(m).__module__.startswith('wsbcn_mm')]


def run_here(monkeypatch, name, *arguments):
    """A tool in this process: seconds of imports less."""
    path = ROOT / 'tools' / name
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, 'argv', [str(path), *map(str, arguments)])
    module.main()
