"""What the matrix of configs has to hold, by the names of its files, and its models in small."""

import functools
import json
import re
from itertools import product
from pathlib import Path

import torch
from mmdet.models.backbones import ResNet as DetResNet
from mmdet.models.backbones import ResNeXt as DetResNeXt
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.models.backbones import ResNet as SegResNet
from mmseg.structures import SegDataSample

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
FOLDERS = {
    'mask-rcnn': 'mask_rcnn',
    'faster-rcnn': 'faster_rcnn',
    'retinanet': 'retinanet',
    'deeplabv3': 'deeplabv3',
}
NAME = re.compile(
    r'(?P<family>mask-rcnn|faster-rcnn|retinanet|deeplabv3)_(?P<backbone>[rx]\d+(-32x4d)?)(_fpn)?_'
    r'(?P<norm>[a-z0-9-]+)_(?P<gpus>\d+)xb(?P<images>\d+)(-accu(?P<accumulation>\d+))?'
    r'(?P<scratch>-scratch)?-(?P<schedule>1x|2x|6x|20-23-24e|50e)_'
    r'(?P<data>coco|voc12|voc12aug)(-513x513)?'
)


def read_name(stem):
    """What a config's name says, as a dict; numbers as int."""
    parts = NAME.fullmatch(stem).groupdict()
    for key in ('gpus', 'images', 'accumulation'):
        parts[key] = int(parts[key] or 1)
    parts['scratch'] = bool(parts['scratch'])
    return parts


def expected_names():
    """The paper's matrix, row by row; the names of the files without their suffix."""
    # The authors' regime: two images on each of 4 GPUs, one for the deep backbones. R50 also with
    # one image, on twice the GPUs.
    regimes = {
        'r50': ('4xb2', '8xb1'),
        'x50-32x4d': ('4xb2',),
        'r101': ('4xb1',),
        'x101-32x4d': ('4xb1',),
    }
    schedules = {'mask-rcnn': ('2x', '20-23-24e'), 'faster-rcnn': ('1x',)}
    norms = ('frozen-bn', 'gn', 'ws-gn', 'ws-bcn')
    for family, (backbone, gpus) in product(schedules, regimes.items()):
        for norm, regime, schedule in product((*norms, 'frozen-bn-2fc'), gpus, schedules[family]):
            yield f'{family}_{backbone}_fpn_{norm}_{regime}-{schedule}_coco'
        for norm, regime in product(('ws-gn', 'ws-bcn'), gpus):
            yield f'{family}_{backbone}_fpn_{norm}_{regime}-scratch-6x_coco'
    for norm, regime in product(norms, regimes['r50']):
        yield f'retinanet_r50_fpn_{norm}_{regime}-1x_coco'
    by_gpus = ('16xb1', '8xb2', '4xb4')
    on_one_gpu = ('1xb1-accu16', '1xb2-accu8', '1xb4-accu4')
    for backbone, alone in (
        ('r101', ('bn', 'gn', 'ws-gn', 'ws-bcn')),
        ('r50', ('ws-gn', 'ws-bcn')),
    ):
        rows = [*product(('bn', 'sync-bn', 'gn', 'ws-gn', 'ws-bcn', 'ws-bcn-sync'), by_gpus)]
        for norm, regime in [*rows, *product(alone, on_one_gpu)]:
            yield f'deeplabv3_{backbone}_{norm}_{regime}-50e_voc12aug-513x513'
    for regime, data in product(by_gpus[:2], ('voc12', 'voc12aug')):
        yield f'deeplabv3_r101_ws-bcn_{regime}-scratch-50e_{data}-513x513'


def walk(value):
    """Every dict in a config, at any depth."""
    if isinstance(value, dict):
        yield value
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for item in value:
        yield from walk(item)


# ---- in small ----------------------------------------------------------------------------------

WIDTH = 8  # of the stem; a stage has four times its width at its end
CHANNELS = 16  # of neck and heads


def shrink(model):
    """Makes a model's config small: thin, few classes' worth of channels, few RoIs. In place."""
    for part in walk(model):
        if 'num_groups' in part:
            part['num_groups'] = 4
        for key, value in dict(
            out_channels=CHANNELS,
            feat_channels=CHANNELS,
            conv_out_channels=CHANNELS,
            fc_out_channels=CHANNELS,
            nms_pre=50,
            max_per_img=10,
        ).items():
            if key in part:
                part[key] = value
    stages = [4 * WIDTH * 2**i for i in range(4)]
    model.backbone.update(base_channels=WIDTH, init_cfg=None)
    if model.backbone.type == 'ResNeXt':
        model.backbone.update(groups=4)
    if 'neck' in model:
        model.neck.in_channels = stages
        for head in ('rpn_head', 'bbox_head'):
            if head in model:
                model[head].in_channels = CHANNELS
        if 'roi_head' in model:
            for head in ('bbox_head', 'mask_head'):
                if head in model.roi_head:
                    model.roi_head[head].in_channels = CHANNELS
            model.train_cfg.rpn.sampler.num = 32
            model.train_cfg.rcnn.sampler.num = 16
    else:
        model.data_preprocessor.size = (65, 65)
        model.decode_head.update(in_channels=stages[3], channels=CHANNELS)
        model.auxiliary_head.update(in_channels=stages[2], channels=CHANNELS)
    return model


def one_block_a_stage(monkeypatch):
    """Every ResNet and ResNeXt gets one block in each stage, whatever its depth."""
    for kind in {DetResNet, DetResNeXt, SegResNet}:
        settings = {d: (block, (1, 1, 1, 1)) for d, (block, _) in kind.arch_settings.items()}
        monkeypatch.setattr(kind, 'arch_settings', settings)


def build(cfg):
    """The model of a config."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


@functools.cache
def load(file):
    return Config.fromfile(file)


@functools.cache
def _built(text, scope):
    model = Config(json.loads(text))
    with torch.device('meta'):
        return build(Config(dict(model=model, default_scope=scope)))


def built(file):
    """The model at full size, without memory; configs with the same model share one."""
    cfg = load(file)
    return _built(json.dumps(cfg.model.to_dict(), sort_keys=True), cfg.default_scope)


def detection_sample(height, width, masks):
    shape = dict(img_shape=(height, width), ori_shape=(height, width))
    sample = DetDataSample(metainfo=dict(**shape, scale_factor=(1.0, 1.0), img_id=0))
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [30.0, 10.0, 90.0, 60.0]])
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.tensor([0, 7]))
    if masks:
        bitmaps = torch.zeros(2, height, width, dtype=torch.uint8)
        for bitmap, (x0, y0, x1, y1) in zip(bitmaps, boxes.int().tolist()):
            bitmap[y0:y1, x0:x1] = 1
        sample.gt_instances.masks = BitmapMasks(bitmaps.numpy(), height, width)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4))
    return sample


def segmentation_sample(height, width):
    sample = SegDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 21, (1, height, width)))
    return sample


def make_batch(family, images):
    inputs, samples = [], []
    for _ in range(images):
        if family == 'deeplabv3':
            size = 65, 65  # what shrink pads to
            samples.append(segmentation_sample(*size))
        else:
            size = 64, 96
            samples.append(detection_sample(*size, family == 'mask-rcnn'))
        inputs.append(torch.randint(0, 256, (3, *size), dtype=torch.uint8))
    return dict(inputs=inputs, data_samples=samples)
