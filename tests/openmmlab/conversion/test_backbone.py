"""wsbcn_mm.openmmlab.conversion.backbone: a BN backbone kept with its weights."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmdet', reason='converts configs of mmdet')
pytest.importorskip('mmseg', reason='converts configs of mmseg')

import torch
from mmengine.runner import Runner
from torch import nn

from tests.openmmlab.conversion.test_convert import retinanet, tiny
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.openmmlab.audit import audit
from wsbcn_mm.openmmlab.checkpoints import at_hand
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.convert import convert_config
from wsbcn_mm.openmmlab.conversion.layers import NothingToConvert
from wsbcn_mm.openmmlab.conversion.write import write_config

LR = 'optim_wrapper.optimizer.lr'
DEEPLAB = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512.py'


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / 'resnet18.pth'
    torch.save({'bn1.running_mean': torch.zeros(64)}, path)
    return str(path)


def pretrained(weights, **rest):
    return retinanet(init_cfg=dict(type='Pretrained', checkpoint=weights), **rest)


def test_a_detector_whose_weights_are_here(tmp_path, weights):
    """The backbone stays; neck and head, which had no norm, get BCN and WS."""
    rate = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    source = tiny(
        tmp_path, pretrained(weights), train_dataloader=dict(batch_size=2), optim_wrapper=rate
    )
    conversion = convert_config(source, gpus=1)
    cfg = conversion.cfg
    assert (cfg.model.backbone.type, cfg.model.backbone.kind) == ('Kept', 'ResNet')
    assert cfg.model.backbone.init_cfg.checkpoint == weights
    assert cfg.model.neck.norm_cfg.type == 'BCN' and cfg.model.neck.conv_cfg.type == 'WSConv2d'
    model = probe.build(cfg)
    assert not any(isinstance(m, (BatchChannelNorm2d, WSConv2d)) for m in model.backbone.modules())
    assert isinstance(model.neck.lateral_convs[0].conv, WSConv2d)
    assert isinstance(model.bbox_head.cls_convs[0].norm, BatchChannelNorm2d)
    assert type(model.bbox_head.retina_cls) is nn.Conv2d
    assert 'paramwise_cfg' not in cfg.optim_wrapper
    assert cfg.optim_wrapper.optimizer.lr == 0.01  # pretrained: not divided by the batch
    text = write_config(conversion, tmp_path / 'out.py')
    assert "kind='ResNet'" in text and not [f for f in audit(cfg) if f.level == 'error']


def test_a_runner_of_it_trains_the_rest(tmp_path, weights):
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
    source = pretrained(weights, norm_eval=False, frozen_stages=1)
    cfg = convert_config(tiny(tmp_path, source, optim_wrapper=wrapper)).cfg
    cfg.model.backbone.init_cfg = None  # the file of this test holds no weights
    runner = Runner(cfg.model, str(tmp_path), default_scope='mmdet', experiment_name='kept')
    model = runner.model.train()
    sum(x.mean() for x in model(torch.randn(1, 3, 64, 64))[0]).backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.neck.parameters())
    groups = runner.build_optim_wrapper(cfg.optim_wrapper).optimizer.param_groups
    assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))  # resumes
    assert not any(m.training for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))


def test_a_kept_one_is_kept_or_given_up(tmp_path, weights):
    first = convert_config(tiny(tmp_path, pretrained(weights))).cfg
    with pytest.raises(NothingToConvert):  # as it is
        convert_config(first)
    first.model.backbone.frozen = False
    conversion = convert_config(first, backbone='convert')
    assert conversion.cfg.model.backbone.type == 'ResNet'
    assert not {'kind', 'frozen'} & conversion.cfg.model.backbone.keys()
    assert conversion.cfg.model.backbone.norm_cfg.type == 'BCN'
    first.model.backbone.init_cfg = None
    (found,) = (f for f in audit(first) if f.level == 'error')
    assert found.code == 'frozen-random-weights'


def test_a_segmenter_keeps_the_weights_that_it_names_itself(weights):
    from wsbcn_mm.openmmlab.config import load_config

    cfg = load_config(DEEPLAB)
    cfg.model.pretrained = weights
    model = convert_config(cfg, gpus=1).cfg.model
    assert model.pretrained == weights and model.backbone.norm_cfg.type == 'SyncBN'
    assert model.backbone.type == 'Kept' and model.decode_head.norm_cfg.type == 'BCN'


def test_weights_that_are_not_here_are_named(tmp_path):
    """Without them the backbone is converted, and a line says how to keep it."""
    source = tiny(tmp_path, pretrained('torchvision://resnet18'))
    conversion = convert_config(source)
    assert conversion.cfg.model.backbone.norm_cfg.type == 'BCN'
    assert any('--backbone keep' in text for text in conversion.warnings)
    kept = convert_config(source, backbone='keep').cfg.model.backbone
    assert kept.init_cfg.checkpoint == 'torchvision://resnet18'
    assert (kept.type, kept.kind) == ('Kept', 'ResNet')


def test_convert_converts(tmp_path, weights):
    source = tiny(tmp_path, pretrained(weights))
    cfg = convert_config(source, backbone='convert').cfg
    assert cfg.model.backbone.norm_cfg.type == 'BCN' and cfg.model.backbone.init_cfg is None


def test_what_cannot_be_kept(tmp_path, weights):
    with pytest.raises(ValueError, match='checkpoint'):
        convert_config(
            tiny(tmp_path, pretrained(weights)),
            checkpoint=weights,
            backbone='keep',
        )
    norms = retinanet(norm_cfg=dict(type='GN', num_groups=16))
    with pytest.raises(ValueError, match='no model.backbone with BatchNorm'):
        convert_config(tiny(tmp_path, norms, 'gn_8xb2.py'), backbone='keep')
    with pytest.raises(ValueError, match='backbone must be one of'):
        convert_config(tiny(tmp_path, norms, 'gn_8xb2.py'), backbone='frozen')
    empty = convert_config(tiny(tmp_path, retinanet(), 'no_8xb2.py'), backbone='keep')
    assert any('no checkpoint fills it' in text for text in empty.warnings)


def test_what_is_at_hand(tmp_path, monkeypatch, weights):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    (tmp_path / 'checkpoints' / 'resnet18-f37072fd.pth').touch()
    assert at_hand(weights) and at_hand('torchvision://resnet18')
    assert at_hand('https://somewhere/models/resnet18-f37072fd.pth')
    assert not at_hand('torchvision://resnet50') and not at_hand(str(tmp_path / 'none.pth'))
