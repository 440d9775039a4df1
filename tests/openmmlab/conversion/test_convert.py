"""wsbcn_mm.openmmlab.conversion.convert: what is set, left, written and refused."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmdet', reason='converts configs of mmdet')
pytest.importorskip('mmseg', reason='converts configs of mmseg')


import torch
from mmengine.config import Config

from tests.tool import tool
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.openmmlab.audit import audit
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.convert import convert_config
from wsbcn_mm.openmmlab.conversion.layers import NothingToConvert
from wsbcn_mm.openmmlab.conversion.write import write_config

MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
PSPNET = 'mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
BCN, WS = dict(type='BCN', num_groups=32), dict(type='WSConv2d')


def tiny(tmp_path, model, name='tiny_8xb2-1x.py', **rest):
    """A config of mmdet with a model of its own."""
    path = tmp_path / name
    keys = dict(default_scope='mmdet', model=model, **rest)
    path.write_text('\n'.join(f'{key} = {value!r}' for key, value in keys.items()) + '\n')
    return str(path)


def retinanet(**backbone):
    """As little of RetinaNet as builds; backbone of ResNet-18."""
    return dict(
        type='RetinaNet',
        backbone=dict(type='ResNet', depth=18, **backbone),
        neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=16, num_outs=5),
        bbox_head=dict(
            type='RetinaHead',
            num_classes=2,
            in_channels=16,
            feat_channels=16,
            stacked_convs=1,
            anchor_generator=dict(
                type='AnchorGenerator',
                ratios=[1.0],
                octave_base_scale=4,
                strides=[8, 16, 32, 64, 128],
                scales_per_octave=1,
            ),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
        ),
    )


def test_a_detector():
    conversion = convert_config(MASK_RCNN)
    cfg, backbone = conversion.cfg, conversion.cfg.model.backbone
    assert backbone.norm_cfg == BCN and backbone.conv_cfg == WS
    assert backbone.norm_eval is False and backbone.frozen_stages == -1
    assert backbone.init_cfg is None
    # What has no norm stays plain (traps 13 and 19).
    for part in (cfg.model.neck, cfg.model.rpn_head, cfg.model.roi_head.mask_head):
        assert 'norm_cfg' not in part and 'conv_cfg' not in part
    assert cfg.train_dataloader.batch_size == 1
    assert cfg.optim_wrapper.optimizer.lr == 0.02  # from scratch no less, see rates.LEAST_RATES
    assert cfg.auto_scale_lr == dict(enable=False, base_batch_size=8)
    assert cfg.custom_imports.imports == ['wsbcn_mm']
    assert any('torchvision://resnet50 dropped' in text for text in conversion.warnings)
    linear = str(convert_config(MASK_RCNN, gpus=32))
    assert 'optim_wrapper.optimizer.lr: 0.02 -> 0.04  # linear rule: 2 -> 1 images' in linear
    assert 'total 16 -> 32' in linear
    assert audit(cfg) == []


def test_a_segmenter_in_all_three_places():
    """Trap 18: the model's own norm_cfg, the auxiliary head, `pretrained`."""
    conversion = convert_config(PSPNET)
    model = conversion.cfg.model
    assert model.pretrained is None
    assert model.backbone.norm_cfg == dict(type='BCN', num_groups='auto')  # a stem of 32 channels
    for part in (model.decode_head, model.auxiliary_head):
        assert part.norm_cfg == BCN and part.conv_cfg == WS
    assert conversion.cfg.optim_wrapper.optimizer.lr == 0.12  # from scratch, at 4 images
    assert conversion.cfg.param_scheduler[0].eta_min == 1.2e-3
    assert conversion.cfg.auto_scale_lr.base_batch_size == 4
    # Half as many images per iteration, so twice as many iterations of everything.
    assert conversion.cfg.param_scheduler[0].end == conversion.cfg.train_cfg.max_iters == 80_000
    assert conversion.cfg.train_cfg.val_interval == 8000
    assert conversion.cfg.default_hooks.checkpoint.interval == 8000
    built = probe.build(conversion.cfg)
    assert isinstance(built.backbone.stem[0], WSConv2d)
    assert isinstance(built.auxiliary_head.convs[0].norm, BatchChannelNorm2d)
    assert type(built.decode_head.conv_seg).__name__ == 'Conv2d'


def test_group_norm_of_the_base_leaves_no_key_behind(tmp_path):
    """Trap 17: merged key by key, num_groups or requires_grad of the old norm would stay."""
    model = retinanet(norm_cfg=dict(type='GN', num_groups=16, requires_grad=True))
    conversion = convert_config(tiny(tmp_path, model))
    text = write_config(conversion, tmp_path / 'out.py')
    assert '_delete_=True' in text
    assert Config.fromfile(tmp_path / 'out.py').model.backbone.norm_cfg == BCN


def test_defaults_that_no_config_shows(tmp_path):
    """ResNet's norm is BN with norm_eval=True unless the config says otherwise."""
    conversion = convert_config(tiny(tmp_path, retinanet()))
    backbone = conversion.cfg.model.backbone
    assert backbone.norm_cfg == BCN and backbone.norm_eval is False
    assert 'frozen_stages' not in backbone  # its default is -1


def test_imports_of_the_source_stay(tmp_path):
    source = tiny(tmp_path, retinanet(), custom_imports=dict(imports=['json']))
    assert convert_config(source).cfg.custom_imports.imports == ['json', 'wsbcn_mm']


def test_the_source_is_not_changed(tmp_path):
    cfg = Config.fromfile(tiny(tmp_path, retinanet()))
    before = cfg.to_dict()
    conversion = convert_config(cfg)
    assert cfg.to_dict() == before
    assert conversion.cfg.model.backbone.norm_cfg == BCN


def test_a_part_whose_conv_cfg_reaches_bare_convolutions():
    """Trap 13: the non-local block passes conv_cfg to convolutions without a norm."""
    source = 'mmseg::nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    conversion = convert_config(source)
    head = conversion.cfg.model.decode_head
    assert (head.type, head.kind) == ('Converted', 'NLHead') and 'conv_cfg' not in head
    assert head.norm_cfg == BCN and conversion.cfg.model.backbone.conv_cfg == WS
    assert not any('decode_head.conv_cfg' in change.where for change in conversion.changes)
    model = probe.build(conversion.cfg).decode_head
    assert type(model).__name__ == 'NLHead'
    assert isinstance(model.convs[0].conv, WSConv2d)
    assert not isinstance(model.nl_block.g.conv, WSConv2d)
    assert audit(conversion.cfg) == []


def test_lateral_convolutions_without_norm_stay_plain(tmp_path):
    """Trap 19: no_norm_on_lateral drops the norm and keeps conv_cfg."""
    source = retinanet()
    source['neck'].update(norm_cfg=dict(type='BN'), no_norm_on_lateral=True)
    conversion = convert_config(tiny(tmp_path, source))
    neck = probe.build(conversion.cfg).neck
    assert isinstance(neck.fpn_convs[0].norm, BatchChannelNorm2d)
    assert isinstance(neck.fpn_convs[0].conv, WSConv2d)
    assert not isinstance(neck.lateral_convs[0].conv, WSConv2d)


def test_the_parts_of_a_list(tmp_path):
    """mmengine builds a list in one go: each part of it is one of its own all the same."""
    source = retinanet()
    source['neck'].update(norm_cfg=dict(type='BN'))
    refine = dict(type='BFP', in_channels=16, num_levels=5, norm_cfg=dict(type='BN'))
    source['neck'] = [source['neck'], dict(refine, refine_type='conv')]
    conversion = convert_config(tiny(tmp_path, source))
    assert not conversion.left
    assert [part.conv_cfg for part in conversion.cfg.model.neck] == [WS, WS]
    assert audit(conversion.cfg) == []


def test_a_part_with_a_convolution_that_has_a_fan_in_of_one():
    """MobileOne has depthwise 1x1 convolutions beside others: these stay, the others get WS."""
    pytest.importorskip('mmpretrain', reason='its config is converted')
    source = 'mmpretrain::mobileone/mobileone-s0_8xb32_in1k.py'
    cfg = convert_config(source).cfg
    assert cfg.model.backbone.kind == 'MobileOne' and 'conv_cfg' not in cfg.model.backbone
    model = probe.build(cfg).backbone
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {isinstance(c, WSConv2d) for c in convs if c.weight[0].numel() > 1} == {True}
    assert {isinstance(c, WSConv2d) for c in convs if c.weight[0].numel() == 1} == {False}


def test_norms_of_a_class_of_their_own_stay():
    """SparK's encoder normalises visible patches alone, and writes zeros elsewhere."""
    pytest.importorskip('mmpretrain', reason='its backbone is converted')
    backbone = dict(type='SparseResNet', depth=50)
    model = dict(type='ImageClassifier', backbone=backbone)
    with pytest.raises(NothingToConvert, match='no part of it holds'):
        convert_config(Config(dict(default_scope='mmpretrain', model=model)))


def test_norms_of_vectors_stay():
    """SimCLR's neck is linear layers with SyncBN, the norm that does not tell for what it is."""
    pytest.importorskip('mmpretrain', reason='its config is converted')
    conversion = convert_config('mmpretrain::simclr/simclr_resnet50_16xb256-coslr-200e_in1k.py')
    assert conversion.left == ['model.neck.norm_cfg: SyncBN without a convolution in front']
    assert conversion.cfg.model.backbone.norm_cfg == BCN
    model = probe.build(conversion.cfg)
    assert isinstance(model.neck.bn0, torch.nn.SyncBatchNorm)


def test_batch_norms_that_no_norm_cfg_reaches():
    """BiSeNetV2 pools to 1x1 in front of a BatchNorm of its own: at one image it cannot train."""
    source = 'mmseg::bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024.py'
    conversion = convert_config(source)
    backbone = conversion.cfg.model.backbone
    assert (backbone.type, backbone.kind) == ('Converted', 'BiSeNetV2')
    model = probe.build(conversion.cfg)
    norm = model.backbone.semantic.stage4_CEBlock.gap[1]
    assert isinstance(norm, BatchChannelNorm2d)
    assert audit(conversion.cfg) == []


def test_groups_fit_every_width_of_a_part(tmp_path):
    conversion = convert_config(tiny(tmp_path, retinanet(base_channels=48)))
    assert conversion.cfg.model.backbone.norm_cfg.num_groups == 'auto'
    with_gn = convert_config(tiny(tmp_path, retinanet(base_channels=48)), norm='GN')
    assert with_gn.cfg.model.backbone.norm_cfg == dict(type='GN', num_groups=24)
    probe.build(with_gn.cfg)


def test_options(tmp_path):
    optim = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.08, weight_decay=1e-4))
    rest = dict(optim_wrapper=optim, train_dataloader=dict(batch_size=4))
    source = tiny(tmp_path, retinanet(frozen_stages=1), 'tiny_8xb4.py', **rest)
    two = convert_config(source, images_per_gpu=2).cfg
    assert two.custom_hooks == [dict(type='EstimatesHook')]  # the rate by images per step
    assert two.optim_wrapper.optimizer.lr == 0.04 and two.auto_scale_lr.base_batch_size == 16
    assert two.optim_wrapper.paramwise_cfg == dict(norm_decay_mult=0.0)
    kept = convert_config(source, keep_lr=True).cfg
    assert kept.optim_wrapper.optimizer.lr == 0.08 and 'auto_scale_lr' not in kept
    plain = convert_config(source, conv='none').cfg
    assert 'conv_cfg' not in plain.model.backbone
    filled = convert_config(source, checkpoint='mine.pth').cfg.model.backbone
    assert filled.init_cfg == dict(type='Pretrained', checkpoint='mine.pth')
    assert filled.frozen_stages == 1


@pytest.mark.parametrize('images, end', [(40, 12), (8000, 8000)])
def test_a_warm_up_made_for_more_images(tmp_path, images, end):
    """500 steps of 16 images are 8000 of one: all of 3 epochs over 40, a third over 8000."""
    (tmp_path / 'a.json').write_text(f'{{"images": {[{}] * images}}}')
    rest = dict(
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02)),
        train_cfg=dict(type='EpochBasedTrainLoop', max_epochs=3),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
            dict(type='MultiStepLR', begin=0, end=3, by_epoch=True, milestones=[2], gamma=0.1),
        ],
        train_dataloader=dict(
            batch_size=2,
            dataset=dict(type='CocoDataset', data_root=str(tmp_path), ann_file='a.json'),
        ),
    )
    done = convert_config(tiny(tmp_path, retinanet(), **rest), gpus=1)
    assert done.cfg.param_scheduler[0].end == end
    lines = [line for line in str(done).split('\n') if line.startswith('param_scheduler')]
    assert len(lines) == 1 and ('still rise when half' in lines[0]) == (images == 40)
    assert f'end={end})' in lines[0].partition(' -> ')[2]
    write_config(done, tmp_path / 'done.py')
    assert 'long-warm-up' not in {finding.code for finding in audit(tmp_path / 'done.py', gpus=1)}


def test_a_checkpoint_brings_its_formula_and_affine(tmp_path):
    source, file = tiny(tmp_path, retinanet()), tmp_path / 'converted.pth'
    torch.save(dict(meta=dict(formula='std_eps', affine='channel'), state_dict={}), file)
    conversion = convert_config(source, checkpoint=str(file))
    backbone = conversion.cfg.model.backbone
    assert backbone.conv_cfg == dict(type='WSConv2d', formula='std_eps')
    assert backbone.norm_cfg == dict(BCN, affine='channel')
    write_config(conversion, tmp_path / 'mine.py')
    torch.save(dict(state_dict={}), file)  # of these layers, as they are by default
    by_default = convert_config(source, checkpoint=str(file))
    assert by_default.cfg.model.backbone.norm_cfg == BCN
    missing = convert_config(source, checkpoint='mine.pth')
    assert any('mine.pth is not here' in warning for warning in missing.warnings)
    file.write_bytes(b'')
    with pytest.raises(ValueError, match='is empty'):
        convert_config(source, checkpoint=str(file))


@pytest.mark.parametrize(
    'arguments, text',
    [
        (dict(norm='IN'), "norm must be one of 'BCN', 'GN'"),
        (dict(conv='DCN'), "conv must be one of 'WSConv2d', 'none'"),
        (dict(images_per_gpu=0), 'images_per_gpu must be at least 1'),
        (dict(gpus=0), 'gpus must be at least 1'),
        (dict(schedule='epochs'), "schedule must be one of 'images', 'keep'"),
    ],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(ValueError, match=text):
        convert_config(MASK_RCNN, **arguments)


def test_deformable_convolutions_are_standardized_or_kept(tmp_path):
    """Trap 20: the host asserts that conv_cfg is None; their WS form is made after building."""
    dcn = dict(type='DCN', deform_groups=1, fallback_on_stride=False)
    model = retinanet()
    model['backbone'].update(depth=50, dcn=dcn, stage_with_dcn=(False, True, True, True))
    model['neck']['in_channels'] = [256, 512, 1024, 2048]
    source = tiny(tmp_path, model)
    converted = convert_config(source)
    assert audit(converted.cfg) == []
    backbone = probe.build(converted.cfg).backbone
    conv = backbone.layer2[0].conv2
    assert type(conv).__name__ == 'WSDeformConv2dPack' and isinstance(backbone.conv1, WSConv2d)
    assert type(conv.conv_offset) is torch.nn.Conv2d  # no norm behind it
    assert isinstance(backbone.layer2[0].norm2, BatchChannelNorm2d)
    plain = convert_config(source, conv='none').cfg.model.backbone
    assert plain.norm_cfg.type == 'BCN' and 'conv_cfg' not in plain
    kept = convert_config(source, keep_dcn=True)
    backbone = probe.build(kept.cfg).backbone
    assert isinstance(backbone.conv1, WSConv2d)
    assert type(backbone.layer2[0].conv2).__name__ == 'DeformConv2dPack'
    assert isinstance(backbone.layer2[0].norm2, BatchChannelNorm2d)
    assert [(f.level, f.code) for f in audit(kept.cfg)] == [('note', 'norm-without-ws')]


def test_convolutions_that_conv_cfg_names_by_a_class_of_their_own(tmp_path):
    """EfficientNet's pad by themselves; SAC mixes two that it standardizes, and stays."""
    converted = convert_config(tiny(tmp_path, retinanet(conv_cfg=dict(type='SAC'))))
    assert any('its convolutions are SAC, which stay: no WS' in line for line in converted.left)
    source = tiny(tmp_path, retinanet(conv_cfg=dict(type='Conv2dAdaptivePadding')))
    converted = convert_config(source)
    assert converted.left == [] and audit(converted.cfg) == []
    backbone = probe.build(converted.cfg).backbone
    kinds = {type(m).__name__ for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)}
    assert kinds == {'WSConv2dAdaptivePadding'} and isinstance(backbone.norm1, BatchChannelNorm2d)
    plain = convert_config(source, conv='none')
    assert type(probe.build(plain.cfg).backbone.conv1).__name__ == 'Conv2dAdaptivePadding'


PURE = """
from mmengine.model import PretrainedInit
from mmdet.models import FPN, ResNet, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder
from torch.nn import BatchNorm2d

default_scope = 'mmdet'
model = dict(
    type=RetinaNet,
    backbone=dict(type=ResNet, depth=18, norm_cfg=dict(type=BatchNorm2d), frozen_stages=1,
                  init_cfg=dict(type=PretrainedInit, checkpoint='torchvision://resnet18')),
    neck=dict(type=FPN, in_channels=[64, 128, 256, 512], out_channels=16, num_outs=5),
    bbox_head=dict(
        type=RetinaHead, num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1,
        norm_cfg=dict(type='GN', num_groups=4),
        anchor_generator=dict(type=AnchorGenerator, ratios=[1.0], octave_base_scale=4,
                              strides=[8, 16, 32, 64, 128], scales_per_octave=1),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder)))
"""


def test_a_config_in_pure_python(tmp_path):
    """It holds classes; a text config cannot inherit from it, which is said."""
    (tmp_path / 'pure.py').write_text(PURE)
    (tmp_path / 'child.py').write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from .pure import *\n'
        'model.backbone.update(dict(depth=34))\n'
    )
    conversion = convert_config(str(tmp_path / 'child.py'))
    text = write_config(conversion, tmp_path / 'mine.py')
    assert any('a complete config, not as a child' in warning for warning in conversion.warnings)
    assert any('torchvision://resnet18 dropped' in warning for warning in conversion.warnings)
    assert '_base_ =' not in text and '# Warning: mine.py is written as' in text
    model = Config.fromfile(tmp_path / 'mine.py').model
    assert model.backbone.norm_cfg == BCN and model.backbone.conv_cfg == WS
    assert (model.backbone.depth, model.backbone.frozen_stages) == (34, -1)
    assert model.bbox_head.norm_cfg == dict(type='BCN', num_groups=8)
    assert audit(str(tmp_path / 'mine.py')) == []
    found = audit(Config.fromfile(tmp_path / 'child.py'))
    assert 'frozen-bn' in {finding.code for finding in found}


def test_nothing_to_convert(tmp_path):
    model = retinanet(norm_cfg=dict(type='LN'))
    model['backbone'] = dict(
        type='SwinTransformer', embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)
    )
    model['neck']['in_channels'] = [24, 48, 96, 192]
    with pytest.raises(NothingToConvert, match='nothing to convert'):
        convert_config(tiny(tmp_path, model))


def test_wrong_names_and_configs_without_a_model(tmp_path):
    with pytest.raises(FileNotFoundError, match='(?s)did you mean.*mmdet::mask_rcnn/mask-rcnn_r50'):
        convert_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coca.py')
    with pytest.raises(FileNotFoundError, match='no config file'):
        convert_config(str(tmp_path / 'none.py'))
    with pytest.raises(ValueError, match='names no known package'):
        convert_config('mmfoo::a.py')
    path = tmp_path / 'data.py'
    path.write_text('batch_size = 1\n')
    with pytest.raises(ValueError, match='has no model'):
        convert_config(str(path))


# ---- writing -----------------------------------------------------------------------------------


def test_a_written_child_is_short_and_reads_back(tmp_path, formatted_configs):
    conversion = convert_config(MASK_RCNN)
    text = write_config(conversion, tmp_path / 'deep' / 'mine.py')
    assert f'_base_ = {MASK_RCNN!r}' in text and len(text.splitlines()) < 40
    assert '# Warning: checkpoint torchvision://resnet50 dropped' in text
    cfg = Config.fromfile(tmp_path / 'deep' / 'mine.py')
    assert audit(cfg) == []
    assert sorted(p.name for p in (tmp_path / 'deep').iterdir()) == ['mine.py']


def test_a_config_that_cannot_be_inherited_is_written_whole(tmp_path):
    """mmengine reads no name with a plus sign."""
    conversion = convert_config('mmdet::gn+ws/faster-rcnn_r50_fpn_gn-ws-all_1x_coco.py')
    text = write_config(conversion, tmp_path / 'mine.py')
    assert '_base_' not in text
    assert any('cannot inherit from faster-rcnn' in warning for warning in conversion.warnings)
    assert Config.fromfile(tmp_path / 'mine.py').model.neck.conv_cfg == WS


def test_lists_are_written_as_a_whole(tmp_path):
    source = 'mmseg::icnet/icnet_r50-d8_4xb2-80k_cityscapes-832x832.py'
    conversion = convert_config(source)
    write_config(conversion, tmp_path / 'mine.py')
    heads = Config.fromfile(tmp_path / 'mine.py').model.auxiliary_head
    assert [head.norm_cfg.type for head in heads] == ['BCN', 'BCN']


def test_writing_over_the_source_is_refused(tmp_path):
    source = tiny(tmp_path, retinanet())
    conversion = convert_config(source)
    with pytest.raises(ValueError, match='source itself'):
        write_config(conversion, source)
    with pytest.raises(ValueError, match='.py file'):
        write_config(conversion, tmp_path / 'x.json')


@pytest.mark.parametrize(
    'source, code, text',
    [(MASK_RCNN, 0, 'written: '), ('mmdet::dcn/none.py', 1, 'error: mmdet has no config')],
)
def test_the_tool(source, code, text, tmp_path):
    result = tool('model_converters/convert_config.py', source, '-o', tmp_path / 'x.py')
    assert result.returncode == code and text in result.stdout + result.stderr


@pytest.mark.parametrize(
    'source, choices, error, words',
    [
        (Config(), dict(gpu=1), TypeError, r"no choice 'gpu'\n  there are norm, conv, .*gpus"),
        (Config(), dict(keep_lr='no'), TypeError, "keep_lr must be True or False\n  got 'no'"),
        (Config(), dict(gpus=0), ValueError, 'gpus must be at least 1'),
        (dict(model={}), {}, TypeError, r'got a dict: Config\(...\) makes one'),
    ],
)
def test_arguments(source, choices, error, words):
    with pytest.raises(error, match=words):
        convert_config(source, **choices)
