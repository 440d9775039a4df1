"""Classifiers of images and of videos: incomplete hosts, training, folding, what is written."""

import pytest

pytest.importorskip('decord', reason='videos are read with it')
pytest.importorskip('mmaction', reason='recognizers are built from it')
pytest.importorskip('mmpretrain', reason='classifiers are built from it')

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner

import wsbcn_mm.openmmlab  # noqa: F401
from wsbcn_mm.checkpoint_layouts import name_in_mmaction
from wsbcn_mm.estimates import layers_of, rate_of_step
from wsbcn_mm.openmmlab import config, loaders, stand_ins
from wsbcn_mm.openmmlab.audit import audit_config
from wsbcn_mm.openmmlab.conversion.convert import convert_config
from wsbcn_mm.openmmlab.data.reading import DataError
from wsbcn_mm.openmmlab.deploy import fold, inference, inputs, labels, predict
from wsbcn_mm.openmmlab.deploy import onnx as export
from wsbcn_mm.openmmlab.deploy import parts as tensor_parts
from wsbcn_mm.openmmlab.deploy.clips import SUFFIXES as VIDEOS
from wsbcn_mm.openmmlab.hooks.estimates import samples_of_a_clip
from wsbcn_mm.shapes import clips

ROOT = Path(__file__).parents[2]
TSM = ROOT / 'configs/quick/quick_tsm_r18_ws-bcn_1xb1_shapes.py'
SLOWONLY = """
_base_ = 'mmaction::_base_/models/slowonly_r50.py'
default_scope = 'mmaction'
model = dict(
    backbone=dict(depth=18, base_channels=8, pretrained=None, pretrained2d=False,
                  norm_cfg=dict(type='BCN3d', num_groups='auto'),
                  conv_cfg=dict(type='WSConv3d')),
    cls_head=dict(in_channels=64, num_classes=3),
)
"""


# ---- modules that are not there ------------------------------------------------------------------


def test_what_the_wheel_of_mmaction_lacks_says_so_when_it_is_used():
    module = importlib.import_module('mmaction.models.localizers')
    if 'drn' in {path.name for path in Path(module.__file__).parent.iterdir()}:
        assert module.DRN.__module__.startswith('mmaction.')  # a complete one stays as it is
        return
    with pytest.raises(stand_ins.Missing, match='DRN: the wheel of mmaction2 on PyPI lacks it'):
        module.DRN()


def test_mmpretrain_without_torchvision(monkeypatch):
    """Its modules are there; what needs torchvision says so, and nobody else sees a stand-in."""
    find = stand_ins.find_spec
    monkeypatch.setattr(stand_ins, 'find_spec', lambda n: None if n == 'torchvision' else find(n))
    for name in stand_ins.USERS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    before = {name for name in sys.modules if name.startswith('torchvision')}
    boxes = importlib.import_module('mmpretrain.models.utils.box_utils').boxes
    with pytest.raises(stand_ins.Missing, match='torchvision.ops.boxes.box_iou: torchvision is'):
        boxes.box_iou(torch.zeros(1, 4), torch.zeros(1, 4))
    assert {name for name in sys.modules if name.startswith('torchvision')} == before


# ---- a small network that was trained a little ---------------------------------------------------


@pytest.fixture(scope='module', autouse=True)
def one_block_per_stage():
    """Networks of 18 layers are half as deep in this file."""
    resnet = importlib.import_module('mmaction.models.backbones.resnet')
    short = {18: (resnet.BasicBlock, (1, 1, 1, 1))}
    with mock.patch.dict(resnet.ResNet.arch_settings, short):
        yield


@pytest.fixture(scope='module')
def clips_root(tmp_path_factory):
    return clips.draw_clips(tmp_path_factory.mktemp('data') / 'clips', 4, 8)


@pytest.fixture(scope='module')
def cfg(clips_root):
    """The quick config: other data, fewer frames."""
    cfg = config.load_config(str(TSM))
    cfg.model.backbone.num_segments = cfg.model.cls_head.num_segments = 4
    cfg.model.backbone.strides = (2, 2, 2, 1)
    for name, loader in loaders.datasets_of(cfg, 'train_dataloader', 'val_dataloader'):
        split = name.partition('_')[0]
        loader.ann_file = f'{clips_root}/{split}_videos.txt'
        loader.data_prefix.video = f'{clips_root}/videos'
        loader.pipeline[1].num_clips = 4
    cfg.test_dataloader = cfg.val_dataloader
    # The drawn data set would be drawn again with its own parameters.
    for _, dataset in loaders.datasets_of(cfg, 'train_dataloader', 'val_dataloader'):
        dataset.update(type='VideoDataset', metainfo=dict(classes=list(clips.MOTIONS)))
    cfg.train_dataloader.batch_size = 2
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.custom_hooks = [dict(type='EstimatesHook')]
    cfg.log_level = 'ERROR'
    return cfg


@pytest.fixture(scope='module')
def trained(cfg, tmp_path_factory):
    """The runner after four clips in two steps; its checkpoint."""
    folder = tmp_path_factory.mktemp('tsm')
    runner = Runner.from_cfg(Config({**cfg.to_dict(), 'work_dir': str(folder)}))
    runner.train()
    return runner, str(folder / 'epoch_1.pth')


def test_frames_are_the_images_of_a_2d_network(trained):
    """Four frames of each of two clips: eight samples, and the rate of eight."""
    runner, _ = trained
    rates = runner.message_hub.get_scalar('train/bcn_rate').data[0]
    assert rates.tolist() == pytest.approx([rate_of_step(0.01, 8)] * 2)
    taken = {int(layer.bn.num_batches_tracked) for layer in layers_of(runner.model).values()}
    assert taken == {2}


def test_samples_of_a_clip():
    assert samples_of_a_clip(dict(inputs=[torch.zeros(8, 3, 4, 4)] * 3)) == 8
    assert samples_of_a_clip(dict(inputs=[torch.zeros(1, 3, 8, 4, 4)] * 3)) == 1
    assert samples_of_a_clip(dict(inputs=dict(RGB=[torch.zeros(2, 3, 8, 4, 4)]))) == 2


def test_a_recognizer_is_folded_and_exported(cfg, trained, tmp_path):
    """Trained = folded = stock = ONNX, the same scores."""
    pytest.importorskip('onnxruntime')
    _, checkpoint = trained
    image = inference.random_image(64, 64)
    planned = inference.load_planned(cfg, checkpoint, image)
    assert len(planned.plan.folds) == 13 and not planned.plan.left
    files = fold.write_folded(planned, checkpoint, tmp_path, 'f', {'noise': image}, None, False)
    stock = Config.fromfile(files[1])
    assert 'wsbcn' not in stock.pretty_text.lower().replace('quick_tsm_r18_ws-bcn', '')
    folded = planned.folded(plain=True).requires_grad_(False)
    x = inference.preprocess(folded, cfg, image)
    assert x.shape == (1, 4, 3, 64, 64)
    (part,) = tensor_parts.tensor_parts(folded, x)
    export.export_part(part, tmp_path / 'clip.onnx')
    export.check_graph(tmp_path / 'clip.onnx')
    assert export.check_results(part, tmp_path / 'clip.onnx') < 1e-4


def test_what_a_recognizer_finds_is_what_testing_evaluates(cfg, trained, clips_root, tmp_path):
    runner, checkpoint = trained
    predictor = predict.Predictor(cfg, inference.load_model(cfg, checkpoint))
    files = inputs.find_images(clips_root / 'videos' / 'val', tmp_path, VIDEOS)
    writer = labels.LabelWriter(tmp_path, predictor.meta['classes'], 3)
    for path, name in files:
        frames, sample = predictor(path)
        assert frames.shape == (4, 64, 64, 3)
        writer.add(name.as_posix(), sample)
    predictor.draw(frames, sample, tmp_path / 'picture.png', 0.3)
    writer.close()
    found = json.loads((tmp_path / 'predictions.json').read_text())['predictions']
    right = np.mean([entry['top'][0]['label'] == i % 8 for i, entry in enumerate(found)])
    assert right == pytest.approx(runner.val_loop.run()['acc/top1'])
    rows = list(csv.DictReader((tmp_path / 'predictions.csv').open()))
    assert len(rows) == 8 * 3 and rows[0]['file'] == '000000.mp4'
    assert rows[0]['class'] == clips.MOTIONS[int(rows[0]['label'])]


def test_a_file_that_is_no_video_is_named(cfg, trained, tmp_path):
    predictor = predict.Predictor(cfg, inference.load_model(cfg, trained[1]))
    (tmp_path / 'a.mp4').write_text('no video')
    with pytest.raises(DataError, match='a.mp4'):
        predictor(tmp_path / 'a.mp4')


# ---- configs -------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / 'configs/tsm').glob('*.py'))


@pytest.mark.parametrize('file', CONFIGS, ids=lambda f: f.stem)
def test_the_matrix_of_tsm(file):
    norm, images = re.fullmatch(r'tsm_r50_(.+)_8xb(\d)-1x1x8-50e_sthv1-rgb', file.stem).groups()
    cfg, images = config.load_config(str(file)), int(images)
    assert cfg.train_dataloader.batch_size == images
    assert cfg.optim_wrapper.optimizer.lr == pytest.approx(0.02 * 8 * images / 128)
    assert cfg.auto_scale_lr.base_batch_size == 8 * images
    assert ('wsbcn_mm' in cfg.get('custom_imports', {}).get('imports', [])) == ('ws' in norm)
    if images == 2:  # the same network
        return
    cfg.model.backbone.update(depth=18, pretrained=None, pretrained2d=False, init_cfg=None)
    cfg.model.cls_head.in_channels = 512
    model = inference.build_model(cfg)
    kinds = {type(m).__name__ for m in model.backbone.modules()}
    norms = {'bn': 'BatchNorm2d', 'ws-bcn': 'BatchChannelNorm2d'}
    assert norms.get(norm, 'GroupNorm') in kinds
    assert ('WSConv2d' in kinds) == ('ws' in norm) and ('Conv2d' in kinds) != ('ws' in norm)
    model.init_weights()
    built = MODELS.switch_scope_and_registry('mmaction')
    with built:
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    held = [p for group in wrapper.param_groups for p in group['params']]
    assert {id(p) for p in held} >= {id(p) for p in model.parameters()}


def test_the_control_on_single_frames_is_the_same_network():
    shapes = []
    for file in (TSM, TSM.with_name('quick_tsm_r18_ws-bcn_1xb1_single-frame.py')):
        cfg = config.load_config(str(file))
        names = inference.build_model(cfg).state_dict()
        shapes.append({name.replace('.net.', '.'): v.shape for name, v in names.items()})
        for _, dataset in loaders.datasets_of(cfg, 'train_dataloader', 'test_dataloader'):
            assert dataset.pipeline[1].num_clips == cfg.model.backbone.num_segments
    assert shapes[0] == shapes[1]


def test_weights_of_imagenet_under_the_names_of_mmaction():
    """Every tensor of a ResNet-50 of the other hosts has its place in a TSM."""
    other = importlib.import_module('mmpretrain.models').ResNet(
        50, norm_cfg=dict(type='BCN'), conv_cfg=dict(type='WSConv2d')
    )
    (file,) = (f for f in CONFIGS if 'ws-bcn_8xb1' in f.name)
    cfg = config.load_config(str(file))
    backbone = inference.build_model(cfg).backbone
    renamed = {name_in_mmaction(k, 'bcn-ws', True): v for k, v in other.state_dict().items()}
    backbone.load_state_dict(renamed)
    assert 'gn' in name_in_mmaction('layer1.0.downsample.1.weight', 'gn-ws', False)


# ---- conversion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'base, first, norms',
    [
        ('tsm_r50', ('WSConv2d', 'BatchChannelNorm2d'), 53),
        ('slowonly_r50', ('WSConv3d', 'BatchChannelNorm3d'), 53),
        ('i3d_r50', ('WSConv3d', 'BatchChannelNorm3d'), 53),
        ('r2plus1d_r34', ('WSConv3d', 'BatchChannelNorm3d'), 72),
        ('trn_r50', ('WSConv2d', 'BatchChannelNorm2d'), 53),  # partial_bn
    ],
)
def test_networks_for_videos_convert(base, first, norms, tmp_path):
    """In 2d and 3d networks every convolution with a norm gets WS, and its norm becomes BCN."""
    source = tmp_path / 'c.py'
    source.write_text(
        f"_base_ = 'mmaction::_base_/models/{base}.py'\ndefault_scope = 'mmaction'\n"
        'train_dataloader = dict(batch_size=8)\n'
    )
    done = convert_config(str(source))
    assert not done.cfg.model.backbone.pretrained
    model = inference.build_model(done.cfg)
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count(first[1]) == norms
    assert kinds.count(first[0]) == norms
    assert not [f for f in audit_config(done.cfg) if f.level == 'error']


def test_a_3d_network_trains_and_folds(tmp_path):
    (tmp_path / 'c.py').write_text(SLOWONLY)
    cfg = Config.fromfile(tmp_path / 'c.py')
    torch.manual_seed(0)
    model = inference.build_model(cfg).train()
    names = list(model.state_dict())
    model.init_weights()
    last = [block.conv2 for block in model.backbone.layer4]
    assert not any(conv.norm.weight.any() for conv in last)  # as the host starts, with a BN
    assert list(model.state_dict()) == names and not any(hasattr(conv, 'bn') for conv in last)
    for conv in last:  # else no gradient comes through yet
        torch.nn.init.ones_(conv.norm.weight)
    inputs = torch.randn(2, 1, 3, 4, 32, 32)
    sample = importlib.import_module('mmaction.structures').ActionDataSample()
    loss = model(inputs, [sample.set_gt_label(1)] * 2, mode='loss')['loss_cls']
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    planned = inference.PlannedModel(
        cfg,
        {},
        model.eval(),
        inference.folding.plan(model, run=inference.run_on(cfg, inference.random_image(32, 32))),
    )
    x = inference.preprocess(model, cfg, inference.random_image(32, 32))
    assert x.shape == (1, 1, 3, 8, 32, 32)
    folded = planned.plan.apply(model)
    error = tensor_parts.relative_error(
        tensor_parts.tensor_parts(model, x), tensor_parts.tensor_parts(folded, x)
    )
    assert error < 1e-4
