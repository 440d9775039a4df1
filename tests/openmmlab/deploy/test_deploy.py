"""Deployment: folded models of configs, stock checkpoints, exports and predictions in files."""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import numpy as np
import torch
from mmcv.cnn import ConvAWS2d, fuse_conv_bn
from mmengine.config import Config
from PIL import Image
from torch import nn

from wsbcn_mm import BatchChannelNorm2d, fold, folding, shapes
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.checkpoints import CheckpointMismatch
from wsbcn_mm.openmmlab.deploy import inference, predict
from wsbcn_mm.openmmlab.deploy import onnx as export
from wsbcn_mm.openmmlab.deploy import settings as plain
from wsbcn_mm.openmmlab.deploy.stock import lists_layers, stock_model

ROOT = Path(__file__).parents[3]
QUICK = {
    'mask_rcnn': ROOT / 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py',
    'deeplabv3': ROOT / 'configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py',
}
MASK_RCNN = ROOT / 'configs/mask_rcnn/mask-rcnn_r50_fpn_ws-bcn_8xb1-scratch-6x_coco.py'
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

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


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


@pytest.fixture(scope='module', params=list(QUICK))
def trained(request):
    """The quick model of one kind, its config and its plan; not to be changed."""
    torch.manual_seed(0)
    cfg = config.load_config(str(QUICK[request.param]))
    model = as_trained(inference.build_model(cfg))
    steps = folding.plan(model, run=inference.run_on(cfg, inference.random_image(*SIZE)))
    return cfg, model, steps


def image_of(model, cfg, size=SIZE):
    return inference.preprocess(model, cfg, inference.random_image(*size))


def error(model, other, x):
    parts = inference.tensor_parts(model, x)
    return inference.relative_error(parts, inference.tensor_parts(other, x))


def our_layers(model):
    return [n for n, m in model.named_modules() if type(m).__module__.startswith('wsbcn_mm')]


# ----------------------------------------------------------------------------------------------
# Folding real models


def test_folded_equals_original(trained):
    cfg, model, steps = trained
    assert steps.left == {}
    norms = sum(isinstance(m, BatchChannelNorm) for m in model.modules())
    assert sum(step.norm is not None for step in steps.folds) == norms
    folded = steps.apply(model)
    assert our_layers(folded) == []
    assert error(model, folded, image_of(model, cfg)) < 1e-5
    double = copy.deepcopy(model).double()
    assert error(double, steps.apply(double), image_of(double, cfg)) < 1e-10


def test_parts_are_those_of_the_model(trained):
    cfg, model, _ = trained
    parts = inference.tensor_parts(model, image_of(model, cfg))
    if cfg.default_scope == 'mmdet':
        assert [p.name for p in parts] == ['image', 'bbox_head', 'mask_head']
        assert parts[0].outputs[:2] == ['feature_0', 'feature_1']
    else:
        assert [p.name for p in parts] == ['image', 'auxiliary_head_0']
        (scores,) = parts[0].module(parts[0].input)
        assert scores.shape == (1, 6, *SIZE)


def test_without_a_run_the_parts_of_a_detector_are_found_as_well(trained):
    """Nobody says how to call it: backbone, neck and heads are tried on their own."""
    _, model, steps = trained
    assert set(folding.plan(model).folds) == set(steps.folds)


def test_an_image_that_is_too_small_is_named():
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=dict(type='MobileNetV3', arch='small', out_indices=(0, 1, 12)),
        decode_head=dict(
            type='LRASPPHead',
            in_channels=(16, 16, 576),
            channels=8,
            in_index=(0, 1, 2),
            input_transform='multiple_select',
            num_classes=2,
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
        test_cfg=dict(mode='whole'),
    )
    cfg = Config(dict(default_scope='mmseg', model=model))
    run = inference.run_on(cfg, inference.random_image(*SIZE))
    with pytest.raises(ValueError, match='does not run on an image of 64x96'):
        folding.plan(inference.build_model(cfg), run=run)


def test_a_wrong_model_is_seen(trained):
    """The comparison that guards the tools: one shift in one norm is found."""
    cfg, model, steps = trained
    wrong = steps.apply(model)
    norm = next(m for m in wrong.modules() if isinstance(m, nn.GroupNorm))
    norm.bias.data[0] += 0.1
    assert error(model, wrong, image_of(model, cfg)) > 1e-4
    norm.bias.data[0] = float('nan')
    assert not error(model, wrong, image_of(model, cfg)) <= 1e9


def small(cfg):
    """R18 of few channels instead of R50, R101 or X101; everything else stays."""
    model = cfg.model
    backbone = model.backbone
    backbone.update(type='ResNet', depth=18, base_channels=32)
    backbone.pop('groups', None), backbone.pop('base_width', None)
    widths = [32, 64, 128, 256]
    if 'neck' in model:
        model.neck.in_channels = widths
    else:
        backbone.contract_dilation = False
        model.decode_head.update(in_channels=256, channels=64)
        model.auxiliary_head.update(in_channels=128, channels=64)
    return cfg


@pytest.mark.parametrize(
    'pattern',
    [
        'mask_rcnn/mask-rcnn_r50_fpn_ws-bcn_8xb1-scratch*',
        'faster_rcnn/*_r50_fpn_ws-gn_*',
        'deeplabv3/*_r50_ws-bcn-sync_8xb2*',
    ],
)
def test_configs_of_every_kind(pattern):
    """In small; tools/dev/check_folding.py goes through all of them as they are."""
    files = sorted((ROOT / 'configs').glob(pattern))
    cfg = small(config.load_config(str(files[0])))
    model = as_trained(inference.build_model(cfg)).double()
    assert our_layers(model)
    x = image_of(model, cfg)
    steps = folding.plan(model, run=inference.run_on(cfg, inference.random_image(*SIZE)))
    folded = steps.apply(model)
    assert our_layers(folded) == [] and steps.left == {}
    assert error(model, folded, x) < 1e-10
    stock = inference.build_model(plain.plain_config(cfg, model)).double()
    plain.load_plain(stock, model, steps)
    assert our_layers(stock) == []
    assert error(model, stock, x) < 1e-10


def test_retinanet_with_a_norm_per_level_gets_convolutions_of_its_own():
    """RetinaSepBN shares the towers' convolutions between levels that have norms of their own.

    The RetinaNet configs of this repository use it.
    """
    cfg = Config.fromstring(LISTED['retinanet'], '.py')
    model = as_trained(inference.build_model(cfg)).double()
    image = inference.random_image(*SIZE)
    steps = folding.plan(model, run=inference.run_on(cfg, image))
    assert steps.left == {}
    assert sum(step.shared for step in steps.folds) == 12  # 2 towers of 2, 3 levels
    folded = steps.apply(model)
    assert our_layers(folded) == []
    assert error(model, folded, image_of(model, cfg)) < 1e-10
    settings = copy.deepcopy(cfg)
    settings.model.bbox_head.norm_cfg = dict(type='BCN', num_groups=4)
    settings.model.backbone.norm_cfg = settings.model.neck.norm_cfg = dict(type='BCN', num_groups=4)
    with pytest.raises(plain.CannotBePlain, match=r'(?s)share the batch stage.*cls_convs'):
        plain.load_plain(inference.build_model(plain.plain_config(settings, model)), model, steps)
    stock_cfg, other = stock_model(cfg, model, steps)
    towers = other.bbox_head.cls_convs
    assert towers[0][0].conv is not towers[1][0].conv and lists_layers(stock_cfg)


# ----------------------------------------------------------------------------------------------
# Stock models


def test_stock_model_equals_original(trained):
    """Before and after the host's own fusion, which leaves what `fold` leaves."""
    cfg, model, steps = trained
    plain_cfg = plain.plain_config(cfg, model)
    assert 'wsbcn_mm' not in plain_cfg.pretty_text and 'BCN' not in plain_cfg.pretty_text
    stock = inference.build_model(plain_cfg)
    plain.load_plain(stock, model, steps)
    x = image_of(model, cfg)
    assert error(model, stock, x) < 1e-5
    double = copy.deepcopy(model).double()
    double_stock = stock.double()
    plain.load_plain(double_stock, double, steps)
    assert error(double, double_stock, x.double()) < 1e-10
    fused = fuse_conv_bn(double_stock)
    assert error(double, fused, x.double()) < 1e-10
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    shapes_of = [
        sorted(tuple(p.shape) for p in m.parameters()) for m in (steps.apply(model), fused)
    ]
    assert shapes_of[0] == shapes_of[1]


def test_automatic_numbers_of_groups():
    cfg = config.load_config(str(QUICK['deeplabv3']))
    for part in (cfg.model.backbone, cfg.model.decode_head, cfg.model.auxiliary_head):
        part.norm_cfg = dict(type='BCN', num_groups='auto')
    with pytest.raises(plain.CannotBePlain, match=r"backbone: num_groups='auto' became \[16, 32\]"):
        plain.plain_config(cfg, inference.build_model(cfg))
    cfg.model.backbone.base_channels = 64
    cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = 256, 128
    model = inference.build_model(cfg)
    assert plain.plain_config(cfg, model).model.backbone.norm_cfg == dict(type='GN', num_groups=32)


def test_what_is_of_this_package_in_a_config_is_dropped_or_named():
    cfg = config.load_config(str(QUICK['deeplabv3']))
    model = inference.build_model(cfg)
    cfg.custom_hooks = [dict(type='CheckpointReportHook'), dict(type='EMAHook')]
    cfg.custom_imports = dict(imports=['wsbcn_mm', 'json'])
    found = plain.plain_config(cfg, model)
    assert found.custom_hooks == [dict(type='EMAHook')]
    assert found.custom_imports['imports'] == ['json']
    cfg.optim_wrapper = dict(type='wsbcn_mm.Something')
    with pytest.raises(plain.CannotBePlain, match='optim_wrapper.type'):
        plain.plain_config(cfg, model)


PURE_PYTHON = """
from mmdet.models import FPN, DetDataPreprocessor, ResNet, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator
from mmengine.model import PretrainedInit

from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.openmmlab.hooks.estimates import EstimatesHook

layers = dict(norm_cfg=dict(type=BatchChannelNorm2d, num_groups={groups}),
              conv_cfg=dict(type=WSConv2d))
model = dict(
    type=RetinaNet, data_preprocessor=dict(type=DetDataPreprocessor),
    backbone=dict(type=ResNet, depth=18, base_channels=8, out_indices=(2, 3),
                  init_cfg=dict(type=PretrainedInit, checkpoint='nowhere.pth'), **layers),
    neck=dict(type=FPN, in_channels=[32, 64], out_channels=8, num_outs=2, **layers),
    bbox_head=dict(
        type=RetinaHead, num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1,
        anchor_generator=dict(type=AnchorGenerator, octave_base_scale=4, ratios=[1.0],
                              scales_per_octave=1, strides=[16, 32])))
custom_hooks = [dict(type=EstimatesHook)]
"""


@pytest.mark.parametrize('groups, lists', [(4, False), ("'auto'", True)])
def test_configs_in_pure_python(tmp_path, groups, lists):
    (tmp_path / 'pure.py').write_text(PURE_PYTHON.format(groups=groups))
    cfg = config.load_config(f'{tmp_path}/pure.py')
    model = as_trained(inference.build_model(cfg)).double()
    steps = folding.plan(model, run=inference.run_on(cfg, inference.random_image(*SIZE)))
    stock_cfg, other = stock_model(cfg, model, steps)
    assert lists_layers(stock_cfg) == lists and 'wsbcn_mm' not in stock_cfg.pretty_text
    assert stock_cfg.model.backbone.init_cfg is None and not our_layers(other)
    assert error(model, other.double(), image_of(model, cfg)) < 1e-6
    assert inference.scope_of(stock_cfg) == 'mmdet'


def test_what_no_stock_model_can_be_is_refused_by_name():
    cfg = Config.fromstring(LISTED['retinanet'], '.py')
    model = as_trained(inference.build_model(cfg))
    run = inference.run_on(cfg, inference.random_image(*SIZE))
    handle = model.neck.lateral_convs[0].bcn.register_forward_hook(lambda *a: None)
    with pytest.raises(plain.CannotBePlain, match=r'neck\.lateral_convs\.0\.bcn: it has hooks'):
        stock_model(cfg, model, folding.plan(model, run=run))
    handle.remove()
    model.backbone.conv1 = ConvAWS2d(3, 8, 7, stride=2, padding=3)  # not from the config
    with pytest.raises(plain.CannotBePlain, match=r'backbone\.conv1: ConvAWS2d, where the stock'):
        stock_model(cfg, model, folding.plan(model, run=run))
    cfg.model.neck.norm_cfg = dict(type='SampleLayerNorm')
    with pytest.raises(plain.CannotBePlain, match=r"neck\.norm_cfg\.type='SampleLayerNorm'"):
        stock_model(cfg, model, folding.plan(model, run=run))


# Shapes of boxes and scores, summed: what stock OpenMMLab finds, without this package.
WITHOUT_US = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'wsbcn_mm':
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
try:
    import wsbcn_mm
except ModuleNotFoundError:
    pass
else:
    raise AssertionError('wsbcn_mm can be imported: this would show nothing')
import json, mmcv, numpy as np
scope, config, checkpoint, *images = sys.argv[1:]
if scope == 'mmdet':
    from mmdet.apis import inference_detector as infer, init_detector as init
else:
    from mmseg.apis import inference_model as infer, init_model as init
model = init(config, checkpoint, device='cpu')
for image in images:
    sample = infer(model, image)
    if scope == 'mmdet':
        found = sample.pred_instances
        print(json.dumps([found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist(),
                          found.masks.sum((1, 2)).tolist() if 'masks' in found else None]))
    else:
        print(json.dumps(sample.pred_sem_seg.data.tolist()))

from pathlib import Path
from mmengine.config import Config
from mmengine.runner import Runner

cfg = Config.fromfile(config)
cfg.load_from, cfg.work_dir = checkpoint, 'tested'
if Path(cfg.test_dataloader.dataset.data_root).exists():
    found = Runner.from_cfg(cfg).test()
    print('metrics', json.dumps({key: float(value) for key, value in found.items()}))
assert 'wsbcn_mm' not in sys.modules
"""


def tool(name, *arguments, cwd=ROOT):
    env = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.run(
        [sys.executable, '-W', 'ignore', ROOT / 'tools' / name, *map(str, arguments)],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Random models as checkpoints, and a few drawn images, one broken."""
    folder = tmp_path_factory.mktemp('deploy')
    (folder / 'images/inner').mkdir(parents=True)
    for i, name in enumerate(('a.png', 'b.jpg', 'inner/a.png')):
        Image.fromarray(shapes.draw_image('val', i)[0]).save(folder / 'images' / name)
    for name, file in QUICK.items():
        torch.manual_seed(0)
        model = as_trained(inference.build_model(config.load_config(str(file))))
        if name == 'mask_rcnn':  # scores above the threshold: something to find
            model.roi_head.bbox_head.fc_cls.weight.data *= 40
        classes = shapes.CLASSES if name == 'mask_rcnn' else ('background', *shapes.CLASSES)
        colours = shapes.PALETTE[1:] if name == 'mask_rcnn' else shapes.PALETTE
        meta = dict(dataset_meta=dict(classes=classes, palette=list(colours)), cfg='wsbcn_mm')
        torch.save(dict(state_dict=model.state_dict(), meta=meta), folder / f'{name}.pth')
    shapes.draw_dataset(folder / 'data', 1, 2, (96, 64))
    for name, text in LISTED.items():
        (folder / f'{name}.py').write_text(text)
        torch.manual_seed(0)
        model = as_trained(inference.build_model(config.load_config(f'{folder}/{name}.py')))
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{name}.pth')
    return folder


@pytest.mark.parametrize('name', [*QUICK, *LISTED])
def test_stock_openmmlab_loads_what_fold_writes(folder, name):
    """In a process where this package cannot be imported; predictions are those of the original."""
    source = QUICK.get(name, folder / f'{name}.py')
    evaluate = ['--evaluate'] if name in LISTED else []
    done = tool(
        'model_converters/fold.py',
        source,
        folder / f'{name}.pth',
        '-o',
        folder / 'stock',
        '--shape',
        *SIZE,
        *evaluate,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [folder / 'stock' / f'{source.stem}_folded{suffix}' for suffix in ('.py', '.pth')]
    assert 'wsbcn_mm' not in files[0].read_text() and b'wsbcn_mm' not in files[1].read_bytes()
    assert 'largest relative error' in done.stdout and str(files[1]) in done.stdout
    assert ('folded_layers' in files[0].read_text()) == (name in LISTED)
    if name in LISTED:
        beside = folder / 'stock/folded_layers.py'
        assert 'wsbcn_mm' not in beside.read_text() and str(beside) in done.stdout

    cfg = config.load_config(str(source))
    images = sorted((folder / 'images').glob('*.*g'))[:2]
    code = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', WITHOUT_US, cfg.default_scope, *files, *images],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env={k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'},
    )
    assert code.returncode == 0, code.stderr[-3000:]
    metrics = [line for line in code.stdout.splitlines() if line.startswith('metrics')]
    assert len(metrics) == (name in LISTED)
    for key, value in json.loads(metrics[0].partition(' ')[2]).items() if metrics else ():
        original, folded = re.search(rf'^{key} +(\S+) +(\S+)$', done.stdout, re.MULTILINE).groups()
        assert abs(value - float(original)) < 2e-3 and abs(value - float(folded)) < 1e-4
    lines = [line for line in code.stdout.splitlines() if line.startswith('[')]
    assert len(lines) == len(images) == 2
    predictor = predict.Predictor(cfg, inference.load_model(cfg, str(folder / f'{name}.pth')))
    for line, file in zip(lines, images):
        sample, found = predictor(file)[1], json.loads(line)
        if cfg.default_scope == 'mmseg':
            same = np.asarray(found) == sample.pred_sem_seg.data.numpy()
            assert same.mean() > 0.999  # ties of two classes
            continue
        own = sample.pred_instances
        assert len(own) == len(found[0]) > 0
        np.testing.assert_allclose(found[0], own.bboxes.numpy(), atol=0.05)
        np.testing.assert_allclose(found[1], own.scores.numpy(), atol=1e-3)
        assert found[2] == own.labels.tolist()


def test_fold_refuses_and_writes_nothing(folder):
    target = folder / 'refused'
    arguments = [QUICK['deeplabv3'], folder / 'deeplabv3.pth', '-o', target, '--shape', *SIZE]
    done = tool('model_converters/fold.py', *arguments, '--tolerance', '1e-12')
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert 'nothing was written' in done.stderr and not target.exists()
    assert float(re.search(r'in float64 folding changes (\S+):', done.stderr)[1]) < 1e-10
    done = tool('model_converters/fold.py', QUICK['mask_rcnn'], *arguments[1:])
    assert done.returncode == 1 and 'does not fill' in done.stderr and not target.exists()
    done = tool('model_converters/fold.py', *arguments, '--images', 'nowhere.png')
    assert done.returncode == 1 and 'no image nowhere.png' in done.stderr


def test_check_folding_goes_through_networks_and_goes_on(folder, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / 'tools/analysis_tools')
    import check_folding

    other = folder / 'other_training.py'
    other.write_text("_base_ = 'segmenter.py'\nmodel = dict(backbone=dict(norm_eval=True))\n")
    names = [f'{folder}/segmenter.py', str(other)]
    file = folder / 'found.jsonl'
    monkeypatch.setattr(sys, 'argv', ['', *names, '--shape', '64', '96', '-o', str(file)])
    check_folding.main()
    (row,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith('| segmenter'))
    assert row.startswith('| segmenter | 2 | 23 | 0 | 0 |') and 'layers listed' in row
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[1]['same_as'] == names[0]
    assert 0 < rows[0]['fold_float64'] < 1e-10 and rows[0]['left'] == {}
    rows[0]['fold_float64'] = 1e-9  # what is in the file is not computed again, but judged
    file.write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match='(?s)too large.*segmenter.py: fold_float64 1e-09'):
        check_folding.main()


# ----------------------------------------------------------------------------------------------
# Export


@pytest.mark.parametrize('opset', [18, 21])
def test_onnx(trained, tmp_path, opset):
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    pytest.importorskip('onnxruntime', reason='runs what is exported')
    cfg, model, steps = trained
    folded = steps.apply(model).requires_grad_(False)
    dynamic = opset == 21
    for part in inference.tensor_parts(folded, image_of(model, cfg)):
        if part.name.startswith('auxiliary'):
            continue
        file = tmp_path / f'{part.name}.onnx'
        meta = export.metadata_of(cfg, model)
        export.export_part(part, file, opset, dynamic, meta)
        counts = export.check_graph(file)
        norms = counts.get('GroupNormalization' if opset == 21 else 'ReduceMean', 0)
        assert norms > 0 and counts['Conv'] > 0
        assert export.check_results(part, file) < 1e-4
        if part.name == 'image' and dynamic:  # another size, another batch size
            part.input = torch.cat([image_of(model, cfg, (96, 64))] * 2)
            assert export.check_results(part, file) < 1e-4
        if part.name != 'image':  # another number of RoIs
            part.input = part.input[:3]
            assert export.check_results(part, file) < 1e-4


@pytest.mark.parametrize('kind', ['computed', 'foreign', 'constant'])
def test_graphs_that_are_refused(tmp_path, kind):
    """A weight that is computed in the graph, as a WS convolution's; an operator of somebody."""
    onnx = pytest.importorskip('onnx', reason='makes the graph')
    make = onnx.helper
    weight = onnx.numpy_helper.from_array(np.ones((2, 3, 1, 1), np.float32), 'w')
    domain = 'some.company' if kind == 'foreign' else ''
    nodes = [
        make.make_node('Mul', ['w', 'w'], ['w2']),
        make.make_node('Conv', ['x', 'w2' if kind == 'computed' else 'w'], ['z']),
        make.make_node('Relu', ['z'], ['y'], domain=domain),
    ]
    ends = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (1, channels, 4, 4))
        for name, channels in (('x', 3), ('y', 2))
    ]
    graph = make.make_graph(nodes, 'g', ends[:1], ends[1:], [weight])
    imports = [make.make_opsetid('', 18), make.make_opsetid('some.company', 1)]
    onnx.save(make.make_model(graph, opset_imports=imports), str(tmp_path / 'a.onnx'))
    if kind == 'constant':
        assert export.check_graph(tmp_path / 'a.onnx') == dict(Mul=1, Conv=1, Relu=1)
        return
    words = (
        'weight of z is computed' if kind == 'computed' else 'some.company::Relu is not standard'
    )
    with pytest.raises(export.NotExportable, match=words):
        export.check_graph(tmp_path / 'a.onnx')


def test_onnx_with_another_result_is_refused(trained, tmp_path):
    pytest.importorskip('onnxruntime', reason='runs what is exported')
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    module = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()

    class Tuple(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return (self.inner(x),)

    part = inference.Part('image', Tuple(), torch.randn(1, 3, 8, 8), ['y'])
    export.export_part(part, tmp_path / 'wrong.onnx')
    assert export.check_results(part, tmp_path / 'wrong.onnx') < 1e-6
    module[0].bias.data += 1
    with pytest.raises(export.NotExportable, match='differs from torch'):
        export.check_results(part, tmp_path / 'wrong.onnx')


def test_export_onnx_writes_checked_files(folder):
    pytest.importorskip('onnxscript', reason="torch's exporter needs it")
    onnx = pytest.importorskip('onnx', reason='reads what is exported')
    done = tool(
        'model_converters/export_onnx.py',
        QUICK['mask_rcnn'],
        folder / 'mask_rcnn.pth',
        '--shape',
        *SIZE,
        '-o',
        folder / 'onnx',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    names = ['bbox_head.onnx', 'image.onnx', 'mask_head.onnx']
    assert sorted(f.name for f in (folder / 'onnx').iterdir()) == names
    meta = {
        p.key: json.loads(p.value)
        for p in onnx.load(str(folder / 'onnx/image.onnx')).metadata_props
    }
    assert meta['classes'] == list(shapes.CLASSES) and meta['channel_order'] == 'RGB'


def test_torch_export_and_trace(trained):
    cfg, model, steps = trained
    part = inference.tensor_parts(steps.apply(model), image_of(model, cfg))[0]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        expected = part.module(part.input)
        exported = torch.export.export(part.module, (part.input,)).module()
        traced = torch.jit.trace(part.module, part.input, check_trace=False)
        for other in (exported, traced):
            for got, want in zip(other(part.input), expected):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype, bound', [(torch.bfloat16, 0.15), (torch.float16, 0.03)])
def test_half_precision(trained, dtype, bound):
    cfg, model, steps = trained
    part = inference.tensor_parts(steps.apply(model), image_of(model, cfg))[0]
    with torch.no_grad():
        expected = part.module(part.input)
        found = part.module.to(dtype)(part.input.to(dtype))
    for got, want in zip(found, expected):
        assert got.dtype == dtype and got.isfinite().all()
        scale = want.abs().max()
        assert ((got.float() - want).abs().max() / scale).item() < bound


# ----------------------------------------------------------------------------------------------
# Predictions in files


@EACH
def test_infer_writes_predictions_and_pictures(folder, name):
    (folder / 'images/broken.jpg').write_text('no picture')
    (folder / 'images/empty.png').write_bytes(b'')
    (folder / 'images/notes.txt').write_text('no image file')
    out = folder / f'found_{name}'
    done = tool('infer.py', QUICK[name], folder / f'{name}.pth', folder / 'images', '-o', out)
    assert done.returncode == 1 and 'Traceback' not in done.stderr  # two cannot be read
    assert 'broken.jpg' in done.stderr and 'empty.png' in done.stderr, done.stderr[-2000:]
    assert 'norms folded' in done.stdout
    pictures = sorted(f.relative_to(out).as_posix() for f in out.glob('pictures/**/*.jpg'))
    assert pictures == ['pictures/a.jpg', 'pictures/b.jpg', 'pictures/inner/a.jpg']
    cfg = config.load_config(str(QUICK[name]))
    predictor = predict.Predictor(cfg, inference.load_model(cfg, str(folder / f'{name}.pth')))
    _, sample = predictor(folder / 'images/inner/a.png')
    if name == 'deeplabv3':
        mask = Image.open(out / 'masks/inner/a.png')
        assert mask.mode == 'P'
        assert (np.asarray(mask) == sample.pred_sem_seg.data[0].numpy()).mean() > 0.999
        return
    from pycocotools.coco import COCO

    coco = COCO(out / 'predictions.json')
    assert [i['file_name'] for i in coco.dataset['images']] == ['a.png', 'b.jpg', 'inner/a.png']
    assert [c['name'] for c in coco.dataset['categories']] == list(shapes.CLASSES)
    found = coco.loadAnns(coco.getAnnIds(imgIds=[3]))
    own = sample.pred_instances
    assert len(found) == len(own) > 0
    for entry, box, mask in zip(found, own.bboxes.tolist(), own.masks.numpy()):
        x1, y1, x2, y2 = box
        np.testing.assert_allclose(entry['bbox'], [x1, y1, x2 - x1, y2 - y1], atol=0.1)
        assert abs(int(coco.annToMask(entry).sum()) - int(mask.sum())) <= 5


def test_infer_takes_ids_from_an_annotation_file(folder):
    given = dict(
        images=[dict(id=77, file_name='b.jpg')],
        annotations=[],
        categories=[dict(id=10 * i, name=n) for i, n in enumerate(reversed(shapes.CLASSES), 1)],
    )
    (folder / 'given.json').write_text(json.dumps(given))
    out = folder / 'found_one'
    arguments = [QUICK['mask_rcnn'], folder / 'mask_rcnn.pth']
    done = tool(
        'infer.py',
        *arguments,
        folder / 'images/b.jpg',
        '-o',
        out,
        '--no-fold',
        '--no-pictures',
        '--annotations',
        folder / 'given.json',
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / 'predictions.json').read_text())
    assert [i['id'] for i in found['images']] == [77]
    assert {a['image_id'] for a in found['annotations']} == {77}
    assert {a['category_id'] for a in found['annotations']} <= {10, 20, 30, 40, 50}
    assert [f.name for f in out.iterdir()] == ['predictions.json']
    done = tool('infer.py', *arguments, folder / 'nowhere', '-o', out)
    assert done.returncode == 1 and 'no image file or folder' in done.stderr
    assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
    'scope, kind, first',
    [('mmdet', 'CocoDataset', 'person'), ('mmseg', 'CityscapesDataset', 'road')],
)
def test_classes_of_a_hosts_dataset_where_the_checkpoint_names_none(scope, kind, first):
    loader = dict(dataset=dict(type='RepeatDataset', dataset=dict(type=kind)))
    cfg = Config(dict(default_scope=scope, test_dataloader=loader))
    model = nn.Identity()
    assert predict.classes_of(cfg, model)['classes'][0] == first
    model.dataset_meta = dict(classes=('a', 'b'))
    assert predict.classes_of(cfg, model)['classes'] == ['a', 'b']
    cfg.test_dataloader.dataset.dataset.type = 'BaseSegDataset' if scope == 'mmseg' else 'Unknown'
    del model.dataset_meta
    with pytest.raises(ValueError, match='knows the names of the classes'):
        predict.classes_of(cfg, model)


def test_files_with_one_result_are_named(tmp_path):
    for name in ('a.png', 'a.jpg'):
        (tmp_path / name).write_bytes(b'x')
    with pytest.raises(ValueError, match='would write the same results'):
        predict.find_images(tmp_path, tmp_path / 'out')
    (tmp_path / 'a.jpg').unlink()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/b.png').write_bytes(b'x')  # a result of ours
    assert predict.find_images(tmp_path, tmp_path / 'out') == [(tmp_path / 'a.png', Path('a.png'))]
    with pytest.raises(FileNotFoundError, match='no image in'):
        predict.find_images(tmp_path / 'out', tmp_path / 'out')


def test_an_interrupted_run_leaves_no_half_file(tmp_path):
    writer = predict.CocoWriter(tmp_path / 'predictions.json', ['a'])
    assert not (tmp_path / 'predictions.json').exists()
    writer.close(complete=False)
    assert list(tmp_path.iterdir()) == []


def test_checkpoint_of_another_model():
    cfg = config.load_config(str(QUICK['deeplabv3']))
    with pytest.raises(CheckpointMismatch, match='does not fill'):
        inference.load_model(cfg, dict(state_dict={'backbone.conv1.weight': torch.zeros(1)}))


def test_fold_on_mmcvs_convmodule_with_the_norm_elsewhere():
    """The orders of a ConvModule: only a norm right behind the convolution is folded."""
    from mmcv.cnn import ConvModule

    for order, folds in (
        (('conv', 'norm', 'act'), True),
        (('conv', 'act', 'norm'), False),
        (('norm', 'act', 'conv'), False),
    ):
        layers = dict(norm_cfg=dict(type='BCN', num_groups=2), conv_cfg=dict(type='WSConv2d'))
        module = ConvModule(8, 8, 3, padding=1, order=order, **layers)
        module = as_trained(module).double().eval()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            folded = fold(module)
        assert type(folded.norm) is (nn.GroupNorm if folds else BatchChannelNorm2d), order
        assert type(folded.conv) is nn.Conv2d
        x = torch.randn(2, 8, 9, 9).double()
        torch.testing.assert_close(folded(x), module(x), rtol=1e-11, atol=1e-11)
