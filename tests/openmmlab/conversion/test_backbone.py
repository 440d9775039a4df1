"""wsbcn_mm.openmmlab.conversion.backbone: a BN backbone kept with its weights."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmdet', reason='converts configs of mmdet')
pytest.importorskip('mmseg', reason='converts configs of mmseg')

import torch
from torch import nn

from tests.openmmlab.conversion.test_convert import retinanet, tiny
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.openmmlab.checkpoints import at_hand
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.audit import audit
from wsbcn_mm.openmmlab.conversion.convert import convert_config
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
    assert not {'norm_cfg', 'norm_eval'} & cfg.model.backbone.keys()  # as their defaults are
    assert cfg.model.backbone.init_cfg.checkpoint == weights
    assert cfg.model.neck.norm_cfg.type == 'BCN' and cfg.model.neck.conv_cfg.type == 'WSConv2d'
    model = probe.build(cfg)
    assert not any(isinstance(m, (BatchChannelNorm2d, WSConv2d)) for m in model.backbone.modules())
    assert isinstance(model.neck.lateral_convs[0].conv, WSConv2d)
    assert isinstance(model.bbox_head.cls_convs[0].norm, BatchChannelNorm2d)
    assert type(model.bbox_head.retina_cls) is nn.Conv2d
    frozen = cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone
    assert frozen == dict(lr_mult=0.0, decay_mult=0.0)
    assert cfg.optim_wrapper.optimizer.lr == 0.01  # pretrained: not divided by the batch
    text = write_config(conversion, tmp_path / 'out.py')
    assert 'backbone' in text and not [f for f in audit(cfg) if f.level == 'error']


def test_a_segmenter_keeps_the_weights_that_it_names_itself(weights):
    from wsbcn_mm.openmmlab.config import load_config

    cfg = load_config(DEEPLAB)
    cfg.model.pretrained = weights
    model = convert_config(cfg, gpus=1).cfg.model
    assert model.pretrained == weights and model.backbone.norm_cfg.type == 'SyncBN'
    assert model.backbone.norm_eval is True and model.decode_head.norm_cfg.type == 'BCN'


def test_weights_that_are_not_here_are_named(tmp_path):
    """Without them the backbone is converted, and a line says how to keep it."""
    source = tiny(tmp_path, pretrained('torchvision://resnet18'))
    conversion = convert_config(source)
    assert conversion.cfg.model.backbone.norm_cfg.type == 'BCN'
    assert any('--backbone keep' in text for text in conversion.warnings)
    kept = convert_config(source, backbone='keep').cfg.model.backbone
    assert kept.init_cfg.checkpoint == 'torchvision://resnet18'
    assert 'norm_eval' not in kept  # True is its default


def test_convert_converts(tmp_path, weights):
    cfg = convert_config(tiny(tmp_path, pretrained(weights)), backbone='convert').cfg
    assert cfg.model.backbone.norm_cfg.type == 'BCN' and cfg.model.backbone.init_cfg is None


def test_what_cannot_be_kept(tmp_path, weights):
    with pytest.raises(ValueError, match='checkpoint'):
        convert_config(tiny(tmp_path, pretrained(weights)), checkpoint=weights, backbone='keep')
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
