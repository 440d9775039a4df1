"""A sample of the upstream configs through the sweep, and the sweep's own bookkeeping."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmdet', reason='converts configs of mmdet')
pytest.importorskip('mmseg', reason='converts configs of mmseg')

import json

import sweep_upstream as tool
from mmengine.config import Config
from sweep import examine, upstream_configs
from sweep_report import END, begin_of, got_through, report, write_report
from trial import NOT_REACHED, OK, Trial, try_network

from wsbcn_mm import BatchChannelNorm2d
from wsbcn_mm.openmmlab.conversion.convert import convert_config

# One of every way in which norms and convolutions come into a model.
CONVERTED = {
    'mmdet::faster_rcnn/faster-rcnn_r50-caffe_fpn_1x_coco.py': 'norm without gradient',
    'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py': 'a list of heads',
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py': 'GN that is a default of the head',
    'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py': 'ResNet-18',
    'mmdet::yolox/yolox_tiny_8xb8-300e_coco.py': 'eps and momentum in norm_cfg',
    'mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py': 'heads that share convolutions, not norms',
    'mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py': 'odd widths',
    'mmdet::hrnet/faster-rcnn_hrnetv2p-w18-1x_coco.py': 'branches of 18, 36, 72 channels',
    'mmdet::res2net/faster-rcnn_res2net-101_fpn_2x_coco.py': 'lists of convolutions and norms',
    'mmdet::resnest/mask-rcnn_s50_fpn_syncbn-backbone+head_ms-1x_coco.py': 'split attention',
    'mmdet::regnet/retinanet_regnetx-800MF_fpn_1x_coco.py': 'groups of other widths',
    'mmdet::efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py': 'padding of its own',
    'mmdet::nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py': 'activation before convolution',
    'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py': 'norms of a pixel decoder',
    'mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco.py': 'GN + WS',
    'mmdet::strong_baselines/mask-rcnn_r50_fpn_rpn-2conv_4conv1fc_syncbn-all_lsj-50e_coco.py': (
        'MMSyncBN, which is built where several processes run alone'
    ),
    'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py': 'transposed convolutions',
    'mmdet::dcn/mask-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py': 'deformable convolutions',
    'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py': 'image pooling',
    'mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py': 'depthwise',
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py': 'pyramid pooling',
    'mmseg::upernet/upernet_r18_4xb4-80k_ade20k-512x512.py': 'UPerNet',
    'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py': 'norms of upsampling layers',
    'mmseg::nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024.py': 'bare convolutions',
    'mmseg::bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024.py': 'fixed BatchNorms',
    'mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py': 'three heads',
    'mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py': 'norm before convolution',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': 'transformer with a BN head',
}
OTHERS = {
    'mmdet::ssd/ssd300_coco.py': 'nothing to convert',
    'mmseg::segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py': 'nothing to convert',
}


@pytest.mark.parametrize('source', CONVERTED)
def test_upstream_configs_are_converted(source):
    record = examine(source, run=False)
    assert record['outcome'] == 'converted', record['reason']
    assert record['clean'], record['findings']
    assert record['layers']['bn'] == 0 and record['layers']['bcn'] > 0


@pytest.mark.parametrize('source, outcome', OTHERS.items())
def test_upstream_configs_that_are_something_else(source, outcome):
    record = examine(source, run=False)
    assert record['outcome'] == outcome and record['reason']


@pytest.mark.parametrize(
    'source',
    [
        'mmseg::nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        # Its head makes a norm over one axis of the norm_cfg, by the '2d' in its name.
        'mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
    ],
)
def test_a_step_confirms_what_the_structure_says(source):
    done = try_network(convert_config(source).cfg, 1)
    assert got_through(done.as_dict()) and (done.size, done.without_norm) == (64, []), done


def test_the_sample_is_of_configs_that_are_shipped():
    shipped = {*upstream_configs('mmdet'), *upstream_configs('mmseg')}
    assert shipped >= CONVERTED.keys() | OTHERS.keys()
    assert len(CONVERTED.keys() | OTHERS.keys()) >= 29
    assert not any('_base_' in name for name in shipped)


def test_the_sweep_goes_on_where_it_was_killed(tmp_path):
    file = tmp_path / 'sweep.jsonl'
    done = dict(config='mmdet::a/b.py', outcome='converted', reason='', network='x', clean=True)
    file.write_text(json.dumps(done) + '\n{"config": "mmdet::a/c.py", "outc')
    records = tool.read(file)
    assert list(records) == ['mmdet::a/b.py']
    names = ['mmdet::a/b.py', 'mmdet::a/c.py', 'mmdet::a/d.py']
    assert list(tool.jobs(records, names, False, [])) == [(n, False) for n in names[1:]]
    assert list(tool.jobs(records, names, False, ['converted'])) == [(n, False) for n in names]
    records['mmdet::a/c.py'] = dict(done, network='y', original={}, converted={})
    jobs = tool.jobs(records, [*names, 'mmdet::a/e.py'], True, [])
    assert next(jobs) == (names[0], True)  # c.py was run
    for name, network in ((names[2], 'x'), ('mmdet::a/e.py', 'z')):
        assert next(jobs) == (name, False)
        records[name] = dict(done, network=network)
    assert list(jobs) == [('mmdet::a/e.py', True)]  # as a network that was not seen before


def test_the_table_counts():
    base = dict(reason='', left=[], clean=True, findings=[], layers={}, read_back=True)
    whole = Trial(OK, OK, OK, OK, 64).as_dict()
    why = 'RuntimeError: too small'
    records = {
        'mmdet::a/1.py': dict(
            base, outcome='converted', network='x', original=whole, converted=whole
        ),
        'mmdet::a/2.py': dict(base, outcome='failed', reason='ValueError: a | b'),
        'mmdet::a/3.py': dict(
            base,
            outcome='converted',
            network='y',
            original=whole,
            converted=Trial(OK, OK, why, size=64).as_dict(),
        ),
        'mmseg::b/1.py': dict(base, outcome='nothing to convert', reason='no norm'),
    }
    text = report(records, 4)
    assert '| mmdet | 3 | 2 | 0 | 0 | 1 | 3 | 66.7 % |' in text
    assert '| mmseg | 1 | 0 | 1 | 0 | 0 | 0 |  |' in text
    assert 'ValueError: a \\| b' in text
    assert '| as shipped | 2 | 2 | 2 | 2 |' in text and '| converted | 2 | 2 | 1 | 1 |' in text
    assert 'less far converted than as shipped: 1.' in text
    assert f'| not trained: {why} | gets through | 1 |' in text  # a defect of ours, for all to see


def test_the_tables_leave_what_is_written_by_hand(tmp_path):
    file = tmp_path / 'a.md'
    one, other = begin_of(['mmdet']), begin_of(['mmdet', 'mmseg'])
    file.write_text(f'by hand\n{one}\na\n{END}\n{other}\nold\n{END}\nmore\n')
    write_report(file, 'new', ['mmdet', 'mmseg'])
    left = f'by hand\n{one}\na\n{END}\n{other}\n\nnew\n{END}\nmore\n'
    assert file.read_text() == left
    file.write_text('by hand')
    with pytest.raises(SystemExit, match='to write between'):
        write_report(file, 'new', ['mmdet'])
    assert file.read_text() == 'by hand'


def test_a_network_that_trains_as_shipped_and_not_converted(monkeypatch):
    """What fails, and at which stage, is ours to see."""
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(512, 512)),
        backbone=dict(type='ResNet', depth=18, base_channels=8),
        decode_head=dict(
            type='FCNHead',
            in_channels=64,
            in_index=3,
            channels=8,
            num_classes=2,
            norm_cfg=dict(type='BCN', num_groups=2),
            loss_decode=dict(type='CrossEntropyLoss'),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    cfg = Config(dict(default_scope='mmseg', model=model))
    done = try_network(cfg, 1)
    assert got_through(done.as_dict()) and done.size == 64, done
    forward, seen = BatchChannelNorm2d.forward, []

    def broken(self, x):
        seen.append(self.training)
        if not self.training:
            raise RuntimeError('broken')
        return forward(self, x)

    monkeypatch.setattr(BatchChannelNorm2d, 'forward', broken)
    done = try_network(cfg, 1)
    assert (done.trained, done.evaluated) == (OK, 'RuntimeError: broken') and True in seen
    cfg.model.backbone.init_cfg = dict(type='NoSuchInit')
    done = try_network(cfg, 1)
    assert done.initialised.startswith('KeyError') and done.trained == NOT_REACHED
