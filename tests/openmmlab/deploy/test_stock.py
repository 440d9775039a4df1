"""deploy.settings and stock: the same model of stock layers."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import copy

from mmcv.cnn import ConvAWS2d, fuse_conv_bn
from mmengine.config import Config
from torch import nn

from tests.openmmlab.deploy.models import (
    LISTED,
    QUICK,
    ROOT,
    SIZE,
    as_trained,
    error,
    image_of,
    our_layers,
)
from wsbcn_mm import folding
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.deploy import inference
from wsbcn_mm.openmmlab.deploy.settings import CannotBePlain, load_plain, plain_config
from wsbcn_mm.openmmlab.deploy.stock import lists_layers, stock_model

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures


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
    plan = folding.plan(model, run=inference.run_on(cfg, inference.random_image(*SIZE)))
    folded = plan.apply(model)
    assert our_layers(folded) == [] and plan.left == {}
    assert error(model, folded, x) < 1e-10
    stock = inference.build_model(plain_config(cfg, model)).double()
    load_plain(stock, model, plan)
    assert our_layers(stock) == []
    assert error(model, stock, x) < 1e-10


def test_retinanet_with_a_norm_per_level_gets_convolutions_of_its_own():
    """RetinaSepBN shares the towers' convolutions between levels that have norms of their own.

    The RetinaNet configs of this repository use it.
    """
    cfg = Config.fromstring(LISTED['retinanet'], '.py')
    model = as_trained(inference.build_model(cfg)).double()
    image = inference.random_image(*SIZE)
    plan = folding.plan(model, run=inference.run_on(cfg, image))
    assert plan.left == {}
    assert sum(fold.shared for fold in plan.folds) == 12  # 2 towers of 2, 3 levels
    folded = plan.apply(model)
    assert our_layers(folded) == []
    assert error(model, folded, image_of(model, cfg)) < 1e-10
    four = copy.deepcopy(cfg)
    for part in (four.model.backbone, four.model.neck, four.model.bbox_head):
        part.norm_cfg = dict(type='BCN', num_groups=4)
    with pytest.raises(CannotBePlain, match=r'(?s)share the batch stage.*cls_convs'):
        load_plain(inference.build_model(plain_config(four, model)), model, plan)
    stock_cfg, other = stock_model(cfg, model, plan)
    towers = other.bbox_head.cls_convs
    assert towers[0][0].conv is not towers[1][0].conv and lists_layers(stock_cfg)


def test_stock_model_equals_original(trained):
    """Before and after the host's own fusion, which leaves what `fold` leaves."""
    cfg, model, plan = trained
    plain_cfg = plain_config(cfg, model)
    assert 'wsbcn_mm' not in plain_cfg.pretty_text and 'BCN' not in plain_cfg.pretty_text
    stock = inference.build_model(plain_cfg)
    load_plain(stock, model, plan)
    x = image_of(model, cfg)
    assert error(model, stock, x) < 1e-5
    double = copy.deepcopy(model).double()
    double_stock = stock.double()
    load_plain(double_stock, double, plan)
    assert error(double, double_stock, x.double()) < 1e-10
    fused = fuse_conv_bn(double_stock)
    assert error(double, fused, x.double()) < 1e-10
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    shapes_of = [sorted(tuple(p.shape) for p in m.parameters()) for m in (plan.apply(model), fused)]
    assert shapes_of[0] == shapes_of[1]


def test_automatic_numbers_of_groups():
    cfg = config.load_config(str(QUICK['deeplabv3']))
    for part in (cfg.model.backbone, cfg.model.decode_head, cfg.model.auxiliary_head):
        part.norm_cfg = dict(type='BCN', num_groups='auto')
    with pytest.raises(CannotBePlain, match=r"backbone: num_groups='auto' became \[16, 32\]"):
        plain_config(cfg, inference.build_model(cfg))
    cfg.model.backbone.base_channels = 64
    cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = 256, 128
    model = inference.build_model(cfg)
    assert plain_config(cfg, model).model.backbone.norm_cfg == dict(type='GN', num_groups=32)


def test_what_is_of_this_package_in_a_config_is_dropped_or_named():
    cfg = config.load_config(str(QUICK['deeplabv3']))
    model = inference.build_model(cfg)
    cfg.custom_hooks = [dict(type='CheckpointReportHook'), dict(type='EMAHook')]
    cfg.custom_imports = dict(imports=['wsbcn_mm', 'json'])
    kind = cfg.model.backbone.type
    cfg.model.backbone.update(type='Kept', kind=kind, frozen=True)
    found = plain_config(cfg, model)
    assert (
        found.model.backbone.type == kind and not {'kind', 'frozen'} & found.model.backbone.keys()
    )
    assert found.custom_hooks == [dict(type='EMAHook')]
    assert found.custom_imports['imports'] == ['json']
    cfg.optim_wrapper = dict(type='wsbcn_mm.Something')
    with pytest.raises(CannotBePlain, match='optim_wrapper.type'):
        plain_config(cfg, model)


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
    plan = folding.plan(model, run=inference.run_on(cfg, inference.random_image(*SIZE)))
    stock_cfg, other = stock_model(cfg, model, plan)
    assert lists_layers(stock_cfg) == lists and 'wsbcn_mm' not in stock_cfg.pretty_text
    assert stock_cfg.model.backbone.init_cfg is None and not our_layers(other)
    assert error(model, other.double(), image_of(model, cfg)) < 1e-6
    assert config.scope_of(stock_cfg) == 'mmdet'


def test_what_no_stock_model_can_be_is_refused_by_name():
    cfg = Config.fromstring(LISTED['retinanet'], '.py')
    model = as_trained(inference.build_model(cfg))
    run = inference.run_on(cfg, inference.random_image(*SIZE))
    handle = model.neck.lateral_convs[0].bcn.register_forward_hook(lambda *a: None)
    with pytest.raises(CannotBePlain, match=r'neck\.lateral_convs\.0\.bcn: it has hooks'):
        stock_model(cfg, model, folding.plan(model, run=run))
    handle.remove()
    model.backbone.conv1 = ConvAWS2d(3, 8, 7, stride=2, padding=3)  # not from the config
    with pytest.raises(CannotBePlain, match=r'backbone\.conv1: ConvAWS2d, where the stock'):
        stock_model(cfg, model, folding.plan(model, run=run))
    cfg.model.neck.norm_cfg = dict(type='SampleLayerNorm')
    with pytest.raises(CannotBePlain, match=r"neck\.norm_cfg\.type='SampleLayerNorm'"):
        stock_model(cfg, model, folding.plan(model, run=run))
