"""The matrix of configs: complete, every file what its name says, every model trains and infers.

What a config says is read at full size, built without memory (meta device); the training step and
the inference run in small. ImageNet's configs have a file of their own, test_imagenet_configs.py.
"""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='layers are built by mmcv')
pytest.importorskip('mmdet', reason='half of the configs inherit from mmdet')
pytest.importorskip('mmseg', reason='half of the configs inherit from mmseg')

import json

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from tests.openmmlab import matrix
from tests.openmmlab.matrix import built, load
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.openmmlab.conversion import rates
from wsbcn_mm.openmmlab.layers import MicroBatchNorm2d

FILES = sorted(f for f in matrix.CONFIGS.rglob('*.py') if f.parent.name in matrix.FOLDERS.values())
each = pytest.mark.parametrize('file', FILES, ids=lambda f: f.stem)


def test_the_matrix_is_complete():
    """Every row and column of the paper's tables, and no file that belongs to none."""
    expected = sorted(matrix.expected_names())
    assert sorted(f.stem for f in FILES) == expected
    for file in FILES:
        assert file.parent.name == matrix.FOLDERS[matrix.read_name(file.stem)['family']]


# ---- a config holds what its name says ---------------------------------------------------------

MILESTONES = {'1x': [8, 11], '2x': [16, 22], '20-23-24e': [20, 23], '6x': [65, 71]}
EPOCHS = {'1x': 12, '2x': 24, '20-23-24e': 24, '6x': 73, '50e': 50}
# The learning rate for one image of the total batch: the authors' 0.01 / 8 and 0.007 / 16,
# MMDetection's 0.01 / 16 for RetinaNet.
RATE = {
    'mask-rcnn': 0.01 / 8,
    'faster-rcnn': 0.01 / 8,
    'retinanet': 0.01 / 16,
    'deeplabv3': 0.007 / 16,
}
IMAGES = {
    'mask-rcnn': 117_266,  # of train2017 that have a box
    'faster-rcnn': 117_266,
    'retinanet': 117_266,
    'deeplabv3': 1_464,  # of VOC 2012; with the additional annotations seven times as many
}


@each
def test_regime_and_schedule(file):
    name, cfg = matrix.read_name(file.stem), load(file)
    total = name['gpus'] * name['images'] * name['accumulation']
    assert cfg.train_dataloader.batch_size == name['images']
    assert cfg.optim_wrapper.get('accumulative_counts', 1) == name['accumulation']
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr == pytest.approx(RATE[name['family']] * total)
    assert (optimizer.type, optimizer.momentum, optimizer.weight_decay) == ('SGD', 0.9, 1e-4)
    # MMEngine scales by GPUs x images and knows nothing of accumulation.
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=name['gpus'] * name['images'])
    epochs = EPOCHS[name['schedule']]
    # On the data that it is for. On fewer images the audit says when it is too short.
    steps = epochs * IMAGES[name['family']] // total
    assert optimizer.lr * steps > 10 * rates.LEAST_ROUTE
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ('EpochBasedTrainLoop', epochs)
    if name['family'] == 'deeplabv3':
        assert total == 16
        (poly,) = cfg.param_scheduler
        assert (poly.type, poly.power, poly.end, poly.by_epoch) == ('PolyLR', 0.9, epochs, True)
        crop = next(t for t in cfg.train_pipeline if t.type == 'RandomCrop')
        assert tuple(crop.crop_size) == cfg.model.data_preprocessor.size == (513, 513)
        datasets = cfg.train_dataloader.dataset.get('datasets', [cfg.train_dataloader.dataset])
        lists = [dataset.ann_file.rpartition('/')[2] for dataset in datasets]
        assert lists == ['train.txt', 'aug.txt'][: 1 + (name['data'] == 'voc12aug')]
        assert all(dataset.pipeline == cfg.train_pipeline for dataset in datasets)
    else:
        warmup, steps = cfg.param_scheduler
        assert (warmup.type, warmup.by_epoch, warmup.end) == ('LinearLR', False, 500)
        assert (steps.type, steps.end) == ('MultiStepLR', epochs)
        assert steps.milestones == MILESTONES[name['schedule']]
        masks = name['family'] == 'mask-rcnn'
        assert cfg.train_pipeline[1].get('with_mask', False) == masks
        assert cfg.val_evaluator.metric == (['bbox', 'segm'] if masks else 'bbox')


# The formula of a published checkpoint; from scratch and in the heads it is the paper's.
FORMULA = {'gn': None, 'ws-gn': 'std_eps', 'ws-bcn': 'var_eps', 'ws-bcn-sync': 'var_eps'}
CHECKPOINTS = {
    'r50': 'resnet50',
    'r101': 'resnet101',
    'x50-32x4d': 'resnext50_32x4d',
    'x101-32x4d': 'resnext101_32x4d',
}


def checkpoint(backbone, norm):
    name = CHECKPOINTS[backbone]
    if norm.startswith('ws-bcn'):
        return f'checkpoints/{name}_ws-bcn.pth'
    if norm == 'ws-gn':
        return f'open-mmlab://jhu/{name}_gn_ws'
    if norm == 'gn':
        trainer = 'jhu' if backbone.startswith('x') else 'detectron'
        return f'open-mmlab://{trainer}/{name}_gn'
    return ('open-mmlab://' if backbone.startswith('x') else 'torchvision://') + name


@each
def test_backbone_and_where_it_starts(file):
    name, cfg, model = matrix.read_name(file.stem), load(file), built(file)
    backbone = model.backbone
    blocks = [len(getattr(backbone, layer)) for layer in backbone.res_layers]
    assert blocks == [3, 4, 23 if '101' in name['backbone'] else 6, 3]
    groups = 32 if '32x4d' in name['backbone'] else 1
    assert backbone.layer1[0].conv2.groups == groups
    assert backbone.layer1[0].conv2.out_channels == (128 if groups == 32 else 64)
    assert not backbone.deep_stem  # as in the checkpoints

    init, formulas = (
        cfg.model.backbone.init_cfg,
        {m.formula for m in backbone.modules() if isinstance(m, WSConv2d)},
    )
    affine = {m.affine for m in backbone.modules() if isinstance(m, BatchChannelNorm2d)}
    if name['scratch']:
        assert init is None
        assert formulas == {'paper'}
        if name['family'] != 'deeplabv3':
            assert cfg.optim_wrapper.paramwise_cfg.norm_decay_mult == 0
    else:
        assert init == dict(
            type='Pretrained', checkpoint=checkpoint(name['backbone'], name['norm'])
        )
        # X101 with WS + BCN is made of the WS + GN file: its formula, its scale for every channel.
        made_of_gn = name['backbone'] == 'x101-32x4d' and name['norm'] == 'ws-bcn'
        formula = 'std_eps' if made_of_gn else FORMULA.get(name['norm'])
        assert formulas == ({formula} if formula else set())
        if name['norm'].startswith('ws-bcn'):
            assert affine == ({'channel'} if made_of_gn else {'group'})
    caffe = 'detectron' in str(init)
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.std == ([1.0] * 3 if caffe else [58.395, 57.12, 57.375])
    assert preprocessor.bgr_to_rgb is not caffe


@each
def test_what_is_frozen(file):
    """Pretrained detectors freeze stem and first stage; estimates follow the weights elsewhere."""
    name, model = matrix.read_name(file.stem), built(file)
    model.train()
    frozen = name['family'] != 'deeplabv3' and not name['scratch']
    backbone = model.backbone
    for module in (backbone.conv1, backbone.norm1, backbone.layer1):
        assert all(p.requires_grad is not frozen for p in module.parameters())
    assert (backbone.norm1.training, backbone.layer1.training) == (not frozen, not frozen)
    norms = [m for m in backbone.layer2.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert all(m.training is not name['norm'].startswith('frozen-bn') for m in norms)
    assert all(p.requires_grad for p in backbone.layer2.parameters())


@each
def test_norms_and_head(file):
    """The same head in every row; norm and WS in every place that has a norm, and nowhere else."""
    name, model = matrix.read_name(file.stem), built(file)
    norm = name['norm']
    kind = {
        'gn': nn.GroupNorm,
        'ws-gn': nn.GroupNorm,
        'ws-bcn': BatchChannelNorm2d,
        'ws-bcn-sync': BatchChannelNorm2d,
        'bn': MicroBatchNorm2d,
        'sync-bn': MODELS.get('SyncBN'),
    }.get(norm, nn.BatchNorm2d)
    conv = WSConv2d if norm.startswith('ws-') else nn.Conv2d
    places = [model.backbone.layer3[0].conv1]
    norms = [model.backbone.layer3[0].norm1]
    outside = []
    if name['family'] == 'deeplabv3':
        outside = [*model.decode_head.aspp_modules, model.decode_head.image_pool[1]]
        outside += [model.decode_head.bottleneck, *model.auxiliary_head.convs]
    else:
        outside = [*model.neck.lateral_convs, *model.neck.fpn_convs]
        if name['family'] == 'retinanet':
            towers = [model.bbox_head.cls_convs, model.bbox_head.reg_convs]
            levels = towers if norm == 'frozen-bn' else [level for t in towers for level in t]
            assert all(len(level) == 4 for level in levels)
            outside += [module for level in levels for module in level]
        else:
            head = model.roi_head.bbox_head
            assert (len(head.shared_convs), len(head.shared_fcs)) == (
                (0, 2) if norm == 'frozen-bn-2fc' else (4, 1)
            )
            outside += [*head.shared_convs]
        if name['family'] == 'mask-rcnn':
            assert len(model.roi_head.mask_head.convs) == 4
            outside += [*model.roi_head.mask_head.convs]
    if norm.startswith('frozen-bn'):
        assert not any(module.with_norm for module in outside)
    else:
        places += [module.conv for module in outside]
        norms += [module.norm for module in outside]
    assert {type(m) for m in places} == {conv}
    assert {type(m) for m in norms} == {kind}
    everywhere = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, kind))]
    assert {type(m) for m in everywhere} == {kind}
    if kind is BatchChannelNorm2d:
        batch = norm == 'ws-bcn-sync'
        assert {m.mode for m in everywhere} == {'batch' if batch else 'estimate'}
        assert load(file).get('sync_bn') == ('torch' if batch else None)
        # The weight of one image, which the hook turns into that of a step.
        assert {m.momentum for m in everywhere} == {0.1 if batch else 0.01}
        if not batch:
            assert [hook.type for hook in load(file).custom_hooks] == ['EstimatesHook']


# ---- it runs -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def trained():
    """What was trained already: configs that differ in their schedule alone are one in small."""
    return set()


@each
def test_one_training_step_and_one_inference(file, monkeypatch, trained):
    """In small, through the wrapper of the optimizer that the config asks for."""
    matrix.one_block_a_stage(monkeypatch)
    name = matrix.read_name(file.stem)
    cfg = Config(load(file).to_dict())
    matrix.shrink(cfg.model)
    cfg.model.backbone.depth = 50  # any is as deep
    wrapper = {key: value for key, value in cfg.optim_wrapper.items() if key != 'optimizer'}
    small = json.dumps([cfg.model.to_dict(), wrapper, name['images']], sort_keys=True)
    if small in trained:
        return
    trained.add(small)
    model = revert_sync_batchnorm(matrix.build(cfg)).train()  # the Runner's, in a single process
    images = name['images']
    if name['norm'] == 'sync-bn':
        images = max(images, 2)  # those of all GPUs are its batch
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        batch = matrix.make_batch(name['family'], images)
        optimizer.initialize_count_status(model, 0, 1000)
        for _ in range(name['accumulation'] - 1):
            model.train_step(batch, optimizer)
        assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
        losses = model.train_step(batch, optimizer)
        assert all(value.isfinite() for value in losses.values())
        assert len(losses) >= 3

        after = model.state_dict()
        changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
        assert all(value.isfinite().all() for value in after.values())
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        # The masks' predictor learns of the classes that are there; zero-initialised scales and
        # pooled single values pass no gradient in one step.
        assert {key for key in trained if key.endswith('conv1.weight')} <= changed
        assert not {key for key, p in model.named_parameters() if not p.requires_grad} & changed
        for key, module in model.named_modules():
            if isinstance(module, BatchChannelNorm2d) and module.mode == 'estimate':
                expected = name['accumulation'] if module.training and module.bn.training else 0
                if 'bbox_head' in key or 'mask_head' in key or 'neck' in key:
                    assert (module.bn.num_batches_tracked > 0) == (expected > 0), key
                else:
                    assert module.bn.num_batches_tracked == expected, key

        model.eval()
        with torch.no_grad():
            predicted = model.test_step(matrix.make_batch(name['family'], 1))
    (sample,) = predicted
    if name['family'] == 'deeplabv3':
        assert sample.pred_sem_seg.data.shape == (1, 65, 65)
        assert sample.seg_logits.data.isfinite().all()
    else:
        found = sample.pred_instances
        assert found.bboxes.shape == (len(found), 4)
        assert found.scores.isfinite().all()
        assert ('masks' in found) == (name['family'] == 'mask-rcnn')
    for key, value in model.state_dict().items():
        assert torch.equal(value, after[key])  # inference changes nothing
