"""openmmlab.audit: every finding from a config or a checkpoint that shows it."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmdet', reason='audits configs of mmdet')
pytest.importorskip('mmseg', reason='audits configs of mmseg')

from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from tests.openmmlab.conversion.test_convert import retinanet, tiny
from tests.tool import tool
from wsbcn_mm import BatchChannelNorm2d, WSConv2d
from wsbcn_mm.audit import has_problems
from wsbcn_mm.openmmlab.audit import audit
from wsbcn_mm.openmmlab.config import find_config
from wsbcn_mm.openmmlab.conversion import probe

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
OURS = sorted(
    f for f in CONFIGS.rglob('*ws-bcn*.py') if '_base_' not in f.relative_to(CONFIGS).parts
)
SAMPLE = [f for i, f in enumerate(OURS) if i % 6 == 0 or 'quick' in f.stem]  # seconds, not minutes
GOOD = dict(
    norm_cfg=dict(type='BCN', num_groups=32), conv_cfg=dict(type='WSConv2d'), norm_eval=False
)
SGD = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4)
NO_DECAY = dict(norm_decay_mult=0.0)


def write(
    tmp_path, model=None, name='tiny_8xb1.py', images=1, optimizer=SGD, paramwise=NO_DECAY, **rest
):
    wrapper = dict(type='OptimWrapper', optimizer=optimizer, paramwise_cfg=paramwise)
    rest.update(train_dataloader=dict(batch_size=images), optim_wrapper=wrapper)
    rest.setdefault('custom_hooks', [dict(type='EstimatesHook')])
    return tiny(tmp_path, model or retinanet(**GOOD), name, **rest)


def found(source, **kwargs):
    return {f.code: f for f in audit(source, **kwargs)}


@pytest.mark.parametrize('file', SAMPLE, ids=lambda f: f.stem)
def test_our_own_configs_are_clean(file):
    try:
        findings = audit(str(file))
    except ImportError as error:  # the fork has two hosts
        if all(find_spec(host) for host in ('mmdet', 'mmseg', 'mmpretrain', 'mmaction')):
            raise
        pytest.skip(str(error))
    assert not has_problems(findings), findings


def test_there_are_own_configs():
    assert len(SAMPLE) >= 8 and any('quick' in f.stem for f in SAMPLE)


def test_a_good_config_is_clean(tmp_path):
    assert found(write(tmp_path)) == {}


def mends(fix, tmp_path, source, code, **kwargs):
    """The line of a finding, put into a child config, mends it."""
    child = tmp_path / f'child_{Path(source).stem.rpartition("_")[2]}.py'
    child.write_text(f"_base_ = './{Path(source).name}'\n{fix}\n")
    assert code not in found(str(child), **kwargs)


def test_batch_norm_at_one_image(tmp_path):
    source = write(tmp_path, retinanet(norm_eval=False))
    finding = found(source)['batch-statistics']
    assert finding.level == 'error' and finding.where.startswith('model.backbone')
    mends(finding.fix.partition(';')[0], tmp_path, source, 'batch-statistics')
    assert 'batch-statistics' not in found(source, images_per_gpu=8)


def test_sync_bn(tmp_path):
    model = retinanet(norm_eval=False, norm_cfg=dict(type='SyncBN'))
    assert 'sync-bn-without-processes' not in found(write(tmp_path, model))  # 8xb1
    source = write(tmp_path, model, name='tiny.py')
    assert found(source)['sync-bn-without-processes'].level == 'error'
    assert 'sync-bn-without-processes' not in found(source, gpus=8)


def test_norm_eval(tmp_path):
    source = write(tmp_path, retinanet(**{**GOOD, 'norm_eval': True}))
    finding = found(source)['frozen-estimates']
    assert finding.level == 'error' and 'norm_eval=False' in finding.fix
    mends(finding.fix, tmp_path, source, 'frozen-estimates')


def test_frozen_random_weights(tmp_path):
    source = write(tmp_path, retinanet(**GOOD, frozen_stages=1))
    finding = found(source)['frozen-random-weights']
    mends(finding.fix, tmp_path, source, 'frozen-random-weights')


def test_ws_without_a_norm(tmp_path):
    model = retinanet(**GOOD)
    model['neck']['conv_cfg'] = dict(type='WSConv2d')
    source = write(tmp_path, model)
    finding = found(source)['ws-without-norm']
    assert finding.where.startswith('model.neck')
    mends(finding.fix, tmp_path, source, 'ws-without-norm')


def test_norms_without_ws(tmp_path):
    source = write(tmp_path, retinanet(norm_cfg=GOOD['norm_cfg'], norm_eval=False))
    finding = found(source)['norm-without-ws']
    assert finding.level == 'warning'
    mends(finding.fix, tmp_path, source, 'norm-without-ws')


def test_groups_that_do_not_divide(tmp_path):
    model = retinanet(**{**GOOD, 'norm_cfg': dict(type='BCN', num_groups=48)})
    source = write(tmp_path, model)
    finding = found(source)['groups']
    assert finding.level == 'error' and '48 groups do not divide 64 channels' in finding.why
    mends(finding.fix, tmp_path, source, 'groups')


def test_models_that_cannot_be_built(tmp_path):
    model = retinanet(**GOOD)
    model['neck']['type'] = 'NoSuchNeck'
    with pytest.raises(ValueError, match='(?s)cannot be built here.*NoSuchNeck'):
        audit(write(tmp_path, model))


def test_learning_rate_of_another_batch(tmp_path):
    high = dict(SGD, lr=0.08)
    base = dict(enable=False, base_batch_size=16)
    source = write(tmp_path, optimizer=high, auto_scale_lr=base)
    finding = found(source)['learning-rate']
    assert 'lr=0.04' in finding.fix
    assert 'learning-rate' not in found(source, gpus=16)
    assert 'lr=0.02' in found(source, gpus=1)['learning-rate'].fix  # no less than was measured
    low = write(tmp_path, auto_scale_lr=base)
    assert 'learning-rate' not in found(low, gpus=1)
    scaled = write(tmp_path, auto_scale_lr=dict(enable=True, base_batch_size=16))
    assert 'learning-rate' not in found(scaled)
    named = write(
        tmp_path, name='tiny_8xb2.py', optimizer=high
    )  # the name says 2 images, the config 1
    assert 'learning-rate' in found(named)


@pytest.mark.parametrize('kind', [('LinearLR', 'start_factor'), ('ConstantLR', 'factor')])
@pytest.mark.parametrize('iterations', [6, 150, 1001, 1002])
def test_a_warm_up_longer_than_half_of_the_training(tmp_path, iterations, kind):
    """What a user finds who takes a schedule of COCO for some hundred photographs."""
    warm_up = {'type': kind[0], kind[1]: 1e-3, 'by_epoch': False, 'begin': 0, 'end': 501}
    settings = dict(
        train_cfg=dict(_delete_=True, type='IterBasedTrainLoop', max_iters=iterations),
        param_scheduler=[dict(type='ConstantLR', factor=1.0), warm_up],
    )
    finding = found(write(tmp_path, name='t_1xb1.py', **settings)).get('long-warm-up')
    if iterations > 1001:
        assert finding is None
    else:
        assert finding.where == 'param_scheduler[1].end'
        assert f'until iteration 501, and the training has {iterations}' in finding.why
        end = max(2, iterations // 10)  # the first step alone would keep the first rate
        assert finding.fix == f'--cfg-options param_scheduler.1.end={end}'


@pytest.mark.parametrize(
    'scheduler, words',
    [
        (dict(type='MultiStepLR', milestones=[8, 11], end=12), 'to epoch 8, training ends at 3'),
        (dict(type='CosineAnnealingLR', begin=5, T_max=9), 'to epoch 5, training ends at 3'),
        (dict(type='PolyLR', eta_min=0, end=99), 'to epoch 99, training ends at 3'),
        (dict(type='MultiStepLR', milestones=[2, 11], end=12), None),
        (dict(type='PolyLR', eta_min=0, end=4), None),
    ],
)
def test_a_schedule_for_another_length(tmp_path, scheduler, words):
    """What a user has who shortens ``max_epochs`` and nothing else."""
    warm_up = dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=500)
    loop = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=3)
    path = write(tmp_path, train_cfg=loop, param_scheduler=[warm_up, scheduler])
    finding = found(path).get('schedule-cut-off')
    if words is None:
        assert finding is None
    else:
        assert finding.where == 'param_scheduler.1' and words in finding.why


def test_a_rate_with_which_so_short_a_training_learns_nothing(tmp_path):
    """The rate of 16 images divided for one: too little in 500 steps, enough in a long run."""
    low = dict(optimizer=dict(SGD, lr=0.00125))
    loop = dict(type='IterBasedTrainLoop', max_iters=500)
    source = write(tmp_path, name='tiny_1xb1.py', train_cfg=loop, **low)
    finding = found(source)['rate-too-low']
    assert finding.level == 'warning' and 'lr=0.02' in finding.fix and 'find_lr' in finding.fix
    mends(finding.fix.partition(',')[0], tmp_path, source, 'rate-too-low')
    loop['max_iters'] = 120_000
    assert 'rate-too-low' not in found(write(tmp_path, name='t_1xb1.py', train_cfg=loop, **low))
    stock = retinanet(norm_eval=False)
    loop['max_iters'] = 500
    assert 'rate-too-low' not in found(write(tmp_path, stock, train_cfg=loop, **low))


def test_averaged_weights_without_their_estimates(tmp_path):
    hooks = [dict(type='EstimatesHook'), dict(type='EMAHook')]
    finding = found(write(tmp_path, custom_hooks=hooks))['averaged-estimates']
    assert 'update_buffers=True' in finding.fix
    hooks[1]['update_buffers'] = True
    assert 'averaged-estimates' not in found(write(tmp_path, custom_hooks=hooks))


def test_learning_rate_of_the_parent(tmp_path):
    write(tmp_path, name='parent.py', images=2, optimizer=dict(SGD, lr=0.08))
    child = tmp_path / 'child.py'
    child.write_text("_base_ = './parent.py'\ntrain_dataloader = dict(batch_size=1)\n")
    finding = found(str(child))['learning-rate']
    assert 'lr=0.04' in finding.fix
    child.write_text(child.read_text() + 'optim_wrapper = dict(optimizer=dict(lr=0.04))\n')
    assert 'learning-rate' not in found(str(child))


def test_gradient_accumulation_counts(tmp_path):
    source = write(tmp_path, auto_scale_lr=dict(enable=False, base_batch_size=16))
    cfg = Config.fromfile(source)
    cfg.optim_wrapper.accumulative_counts = 2
    assert 'learning-rate' not in found(cfg)


def test_estimates_that_are_never_synchronised(tmp_path):
    source = write(tmp_path, custom_hooks=[])  # 8xb1
    finding = found(source)['unsynchronised-estimates']
    assert finding.level == 'warning'
    mends(finding.fix, tmp_path, source, 'unsynchronised-estimates')
    assert 'unsynchronised-estimates' not in found(source, gpus=1)


def test_weight_decay_on_norms(tmp_path):
    source = write(tmp_path, paramwise={})
    finding = found(source)['weight-decay']
    assert finding.level == 'note'
    mends(finding.fix, tmp_path, source, 'weight-decay')


def test_checkpoints(tmp_path):
    def init(checkpoint):
        return write(
            tmp_path, retinanet(**GOOD, init_cfg=dict(type='Pretrained', checkpoint=checkpoint))
        )

    source = init('open-mmlab://jhu/resnet50_gn_ws')
    finding = found(source)['formula']
    assert finding.level == 'error' and "'std_eps'" in finding.why
    mends(finding.fix, tmp_path, source, 'formula')
    assert found(init('torchvision://resnet18'))['checkpoint'].level == 'warning'
    authors = tmp_path / 'rn50_bcn_ws.pth'
    torch.save({'module.bn1.pbn.weight': torch.ones(4)}, authors)
    assert "'var_eps'" in found(init(str(authors)))['formula'].why


def test_a_checkpoint_of_another_depth_or_affine(tmp_path):
    file = tmp_path / 'backbone.pth'
    init = dict(type='Pretrained', checkpoint=str(file))
    source = write(tmp_path, retinanet(**GOOD, init_cfg=init))
    state = probe.build(Config.fromfile(source)).backbone.state_dict()
    torch.save(dict(state_dict=state), file)
    assert found(source) == {}
    channel = {k: v.repeat(2) if '.bcn' in k and v.numel() == 32 else v for k, v in state.items()}
    torch.save(dict(state_dict=channel), file)
    finding = found(source)['checkpoint']
    assert finding.level == 'warning' and 'of another shape: layer1.0.bcn1.weight' in finding.why
    torch.save(dict(state_dict={k: v for k, v in state.items() if 'layer4' not in k}), file)
    assert 'not in the file: layer4.0.conv1.weight' in found(source)['checkpoint'].why


def test_a_part_that_stays_bn_is_filled_as_well(tmp_path):
    file = tmp_path / 'detector.pth'
    init = dict(type='Pretrained', checkpoint=str(file))
    source = write(tmp_path, retinanet(init_cfg=init))
    state = probe.build(Config.fromfile(source)).state_dict()
    torch.save(dict(state_dict=state), file)
    assert "prefix='backbone.'" in found(source)['checkpoint'].why
    init['prefix'] = 'backbone.'
    assert 'checkpoint' not in found(write(tmp_path, retinanet(init_cfg=init)))


# ---- checkpoints -------------------------------------------------------------------------------


def save(tmp_path, model, **meta):
    path = tmp_path / 'model.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return str(path)


def test_a_checkpoint_of_ours(tmp_path):
    model = nn.Sequential(WSConv2d(3, 8, 3), BatchChannelNorm2d(8, 4))
    assert found(save(tmp_path, model))['frozen-estimates'].level == 'error'  # never updated
    model(torch.randn(1, 3, 9, 9))
    assert found(save(tmp_path, model)) == {}
    model[1].bn.running_var[0] = float('nan')
    finding = found(save(tmp_path, model))['not-finite']
    assert finding.where == '1.bn.running_var'


def test_a_checkpoint_without_values(tmp_path):
    state = nn.Sequential(nn.Conv2d(3, 8, 3)).to('meta').state_dict()
    state['sparse'] = torch.eye(3).to_sparse()
    torch.save(dict(state_dict=state), tmp_path / 'a.pth')
    assert '3 tensors, first 0.weight' in found(tmp_path / 'a.pth')['no-values'].where


def test_a_checkpoint_of_batch_norm(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    assert 'BatchNorm' in found(save(tmp_path, model))['checkpoint'].why


def test_the_config_inside_of_a_checkpoint_is_audited(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    cfg = Config.fromfile(write(tmp_path, retinanet(**{**GOOD, 'norm_eval': True})))
    assert 'frozen-estimates' in found(save(tmp_path, model, cfg=cfg.pretty_text))


@pytest.mark.parametrize(
    'text',
    [
        'import os\nopen({mark!r}, "w")\nmodel = dict(type="RetinaNet")\n',
        'model = dict(type="os.mkdir", path={mark!r})\n',
        'model = dict(type="mmengine.mkdir_or_exist", dir_name={mark!r})\n',
    ],
)
def test_nothing_of_a_checkpoints_config_is_run(tmp_path, text):
    mark = str(tmp_path / 'mark')
    meta = dict(cfg=text.format(mark=mark))
    torch.save(dict(state_dict=nn.Conv2d(3, 8, 3).state_dict(), meta=meta), tmp_path / 'a.pth')
    finding = found(tmp_path / 'a.pth')['config']
    assert finding.level == 'note' and 'cannot be audited' in finding.why
    assert not Path(mark).exists()


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / 'broken.pth'
    path.write_bytes(b'nothing')
    with pytest.raises(ValueError, match='is not a checkpoint'):
        audit(path)
    torch.save(dict(a=1), path)
    with pytest.raises(ValueError, match='no tensors'):
        audit(path)
    with pytest.raises(FileNotFoundError):
        audit(tmp_path / 'none.pth')
    other = tmp_path / 'model.safetensors'
    other.write_bytes(b'\x10\0\0\0\0\0\0\0{"conv.weight":')
    with pytest.raises(ValueError, match='safetensors.torch.load_file'):
        audit(other)


@pytest.mark.parametrize('good, code', [(True, 0), (False, 1), (None, 2)])
def test_the_exit_code_tells(good, code, tmp_path):
    source = write(tmp_path, retinanet(**{**GOOD, 'norm_eval': not good}))
    result = tool('analysis_tools/audit.py', source if good is not None else 'x')
    assert result.returncode == code, result.stderr


def test_find_config(tmp_path):
    path, base = find_config('mmdet::gn+ws/mask-rcnn_r50_fpn_gn-ws-all_2x_coco')
    assert path.is_file() and base is None
    name = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    assert find_config(name)[1] == name
