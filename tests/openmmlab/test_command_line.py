"""wsbcn_mm.openmmlab.command_line: what the arguments of the tools do to a config."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('mmcv', reason='a config is not read without mmcv')

import argparse
import re

import torch
from mmengine.config import Config

from tests.openmmlab.tiny import make_runner
from wsbcn_mm.openmmlab import command_line, config, optimizers, options

DDP = 'MMDistributedDataParallel'


def test_work_dir_comes_from_the_argument_then_the_config_then_the_name(monkeypatch):
    def work_dir(argument, **content):
        monkeypatch.setattr(config, 'load_config', lambda path, options: Config(content))
        args = argparse.Namespace(
            config='configs/c.py', cfg_options=None, launcher='none', work_dir=argument
        )
        return command_line.read_run(args).work_dir

    assert work_dir('a', work_dir='b') == 'a'
    assert work_dir(None, work_dir='b') == 'b'
    assert work_dir(None) == './work_dirs/c'


def test_draw_pictures_needs_the_hook():
    cfg = Config(dict(default_hooks=dict(timer=dict(type='IterTimerHook'))))
    with pytest.raises(ValueError, match=r'default_hooks\.visualization'):
        command_line.draw_pictures(cfg, True, None, 0)
    cfg = Config(dict(default_hooks=dict(visualization=dict(type='DetVisualizationHook'))))
    command_line.draw_pictures(cfg, True, 'pictures', 1.5)
    assert cfg.default_hooks.visualization == dict(
        type='DetVisualizationHook', draw=True, show=True, wait_time=1.5, test_out_dir='pictures'
    )


def test_every_picture_is_drawn_unless_the_config_says_otherwise():
    for given, interval in ((dict(), 1), (dict(interval=5), 5)):
        hook = dict(type='SegVisualizationHook', **given)
        cfg = Config(dict(default_hooks=dict(visualization=hook), visualizer={}, work_dir='w'))
        command_line.draw_pictures(cfg, False, 'pictures', 0)
        assert cfg.default_hooks.visualization.interval == interval


def test_which_process_this_is(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID', 'SLURM_NTASKS'):
        monkeypatch.delenv(name, raising=False)
    assert command_line.processes('none') == command_line.processes('pytorch') == (0, 1)
    monkeypatch.setenv('SLURM_PROCID', '3')
    monkeypatch.setenv('SLURM_NTASKS', '8')
    assert command_line.processes('slurm') == (3, 8) and command_line.processes('none') == (0, 1)


@pytest.mark.parametrize(
    'own, wrapper',
    [
        (None, dict(type=DDP, broadcast_buffers=False, find_unused_parameters=True)),
        (dict(broadcast_buffers=True), dict(broadcast_buffers=True)),
        (dict(type=DDP, static_graph=True), dict(type=DDP, static_graph=True)),
    ],
)
def test_a_wrapper_on_the_cpu_names_no_device(own, wrapper, monkeypatch):
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda name: None)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setenv('RANK', '0')
    cfg = Config(dict(find_unused_parameters=True, model_wrapper_cfg=own))
    command_line.prepare_distributed(cfg, 'pytorch')
    assert cfg.model_wrapper_cfg == dict(wrapper, device_ids=None)


@pytest.mark.parametrize('launcher', command_line.STARTED)
def test_processes_that_nobody_started(launcher, monkeypatch):
    variable, starter = command_line.STARTED[launcher]
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(command_line, 'get_device', lambda: 'cpu')
    monkeypatch.delenv(variable, raising=False)
    with pytest.raises(ValueError, match=f'{variable} is not set .*: the .* started by {starter}'):
        command_line.prepare_distributed(Config({}), launcher)
    monkeypatch.setenv(variable, '0')
    if launcher != 'pytorch':
        with pytest.raises(ValueError, match='gives each process a GPU'):
            command_line.prepare_distributed(Config({}), launcher)


def test_augment_test_replaces_the_innermost_pipeline():
    with pytest.raises(ValueError, match='tta_model and tta_pipeline'):
        command_line.augment_test(Config(dict(model=dict(type='M'))))
    inner = dict(type='D', pipeline=[dict(type='Old')])
    cfg = Config(
        dict(
            model=dict(type='M'),
            tta_model=dict(type='T'),
            tta_pipeline=[dict(type='New')],
            test_dataloader=dict(dataset=dict(type='RepeatDataset', dataset=inner)),
        )
    )
    command_line.augment_test(cfg)
    assert cfg.model == dict(type='T', module=dict(type='M'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == [dict(type='New')]


@pytest.mark.parametrize('evaluators', [dict(type='CocoMetric'), [dict(type='CocoMetric')]])
def test_keep_predictions_of_detection_adds_an_evaluator(evaluators):
    cfg = Config(dict(default_scope='mmdet', test_evaluator=evaluators))
    with pytest.raises(ValueError, match=r'(?s)\.pkl.*got out\.json'):
        command_line.keep_predictions(cfg, 'out.json')
    command_line.keep_predictions(cfg, 'out.pkl')
    assert [e.type for e in cfg.test_evaluator] == ['CocoMetric', 'mmdet.DumpDetResults']
    assert cfg.test_evaluator[1].out_file_path == 'out.pkl'


def test_keep_predictions_of_a_config_in_pure_python():
    """It has no default scope, and mmengine finds a name of mmdet by mmdet's name only."""
    cfg = Config(dict(default_scope=None, model=dict(type='mmdet.models.RetinaNet')))
    command_line.keep_predictions(cfg, 'out.pkl')
    assert cfg.test_evaluator == [dict(type='mmdet.DumpDetResults', out_file_path='out.pkl')]


def test_keep_predictions_of_segmentation_names_a_folder():
    cfg = Config(dict(default_scope='mmseg', test_evaluator=dict(type='IoUMetric')))
    command_line.keep_predictions(cfg, 'masks')
    assert cfg.test_evaluator == dict(type='IoUMetric', output_dir='masks', keep_results=True)
    cfg.test_evaluator = [dict(type='Other'), dict(type='IoUMetric')]
    command_line.keep_predictions(cfg, 'masks')
    other, writer = cfg.test_evaluator
    assert writer.output_dir == 'masks' and other == dict(type='Other')
    cfg.test_evaluator = None
    with pytest.raises(ValueError, match='--out: masks are written by'):
        command_line.keep_predictions(cfg, 'masks')


BCN = dict(backbone=dict(norm_cfg=dict(type='BCN')))


def test_harden_adds_what_training_needs():
    cfg = Config(dict(model=BCN))
    command_line.harden(cfg)
    assert [hook.type for hook in cfg.custom_hooks] == ['EstimatesHook']
    assert cfg.default_hooks.checkpoint == dict(type='AtomicCheckpointHook', interval=1)
    command_line.harden(cfg)
    assert len(cfg.custom_hooks) == 1


@pytest.mark.parametrize('hooks', [None, {}, dict(timer=None)])
def test_harden_without_default_hooks_replaces_the_one_that_mmengine_would_take(hooks):
    cfg = Config(dict(model=BCN, default_hooks=hooks))
    command_line.harden(cfg)
    assert cfg.default_hooks == {
        **(hooks or {}),
        'checkpoint': dict(type='AtomicCheckpointHook', interval=1),
    }


def test_harden_leaves_alone_what_the_config_says_otherwise():
    """No checkpoints at all, a hook of another class, a hook that was built already."""
    from mmengine.hooks import CheckpointHook, IterTimerHook

    for hook in (None, dict(type='MyCheckpointHook'), CheckpointHook(interval=3)):
        cfg = Config(dict(model={}, default_hooks=dict(checkpoint=hook)))
        command_line.harden(cfg)
        assert cfg.default_hooks == dict(checkpoint=hook)
    timer = IterTimerHook()
    cfg = Config(dict(model=BCN, custom_hooks=[timer]))
    command_line.harden(cfg)
    assert cfg.custom_hooks == [timer, dict(type='EstimatesHook')]


def test_errors_in_one_line():
    """A mistake of the user ends the program; a defect keeps its traceback."""
    with pytest.raises(SystemExit) as ended, command_line.errors_in_one_line():
        raise ValueError('lr must be positive')
    assert ended.value.code == 'error: lr must be positive'
    with pytest.raises(AttributeError), command_line.errors_in_one_line():
        raise AttributeError('a defect')


@pytest.mark.parametrize('level', ['INFO', 'DEBUG'])
def test_the_optimizer_is_logged_in_short(tmp_path, level):
    """mmengine's own lines, one for each setting of each parameter, on request alone."""
    runner = make_runner(tmp_path, log_level=level)
    runner.optim_wrapper['optimizer']['weight_decay'] = 0.1
    keys = {name: dict(lr_mult=1.0) for name in ('head', 'baxbone')}
    runner.optim_wrapper['paramwise_cfg'] = dict(norm_decay_mult=0.0, custom_keys=keys)
    runner.model.head.weight.requires_grad_(False)
    optimizers.log_in_short(runner)
    runner.train()
    (log,) = tmp_path.rglob('*.log')
    said = log.read_text()
    assert 'optimizer: 6 parameters\n' in said and '\n  1 are not trained\n' in said
    assert '\n  4 with lr=0.01, weight_decay=0\n  2 with lr=0.01, weight_decay=0.1\n' in said
    assert '\n  custom_keys: no parameter has baxbone in its name\n' in said
    assert ('paramwise_options' in said) == ('requires_grad=False' in said) == (level == 'DEBUG')


OPTIONS = [
    (
        'param_scheduler.7.end=3',
        r'param_scheduler.7.end: param_scheduler is a list of 1, .*\n  got 7',
    ),
    ('param_scheduler.-1.end=3', r'is a list of 1, .*numbers from 0\n  got -1'),
    ('lr.x=3', r'lr.x: lr is 0.1, which has nothing inside\n  got x'),
    ('load_from.x=3', 'load_from is None, which has nothing inside'),
    ('model', 'key=value is expected\n  got model'),
    ('param_scheduler[0].end=3', r'named by its number: param_scheduler.0.end\n'),
    ("model={'type':'A'}", 'no dict can be given: set what is in it, model.name=value'),
    ('model.a=dict(type=A)', 'no dict can be given'),
    ("a=[dict(type='X', b=1)]", 'no dict can be given'),
    ('model.a=[(1,2', r'takes KEY=VALUE .*\n  got model.a='),
]


@pytest.mark.parametrize('option, words', OPTIONS)
def test_options_that_cannot_be_set(option, words, capsys):
    cfg = Config(dict(model=dict(type='A'), lr=0.1, load_from=None, param_scheduler=[dict(end=1)]))
    with pytest.raises(SystemExit) as end, command_line.errors_in_one_line():
        args = command_line.parser_of('').parse_args(['a.py', 'b.pth', '--cfg-options', option])
        options.merge(cfg, args.cfg_options)
    assert re.search(words, f'{end.value.code}{capsys.readouterr().err}')


def test_options_that_change_nothing_are_named():
    """Variables of a config file are read before the options."""
    cfg = Config(
        dict(
            data_root='data/a/',
            max_epochs=3,
            train_dataloader=dict(dataset=dict(data_root='data/a/', ann_file='data/a/x.json')),
            train_cfg=dict(max_epochs=3, val_interval=3),
        )
    )
    given = {'data_root': 'b/', 'max_epochs': 5, 'modle.depth': 1, 'train_cfg.max_epochs': 5}
    given |= {'load_from': 'a', 'find_unused_parameters': True, 'randomness.seed': 1}
    root, epochs, typo = options.unread(cfg, given)
    inner = 'train_dataloader.dataset'
    assert root.endswith(f'\n  set {inner}.data_root, {inner}.ann_file')
    assert 'max_epochs is a variable' in epochs and epochs.endswith('\n  set train_cfg.max_epochs')
    assert typo.endswith('neither mmengine nor these tools read modle\n  did you mean model?')
    template = command_line.parser_of('').parse_args(
        ['a.py', 'b.pth', '--cfg-options', 'default_hooks.checkpoint.filename_tmpl=epoch_{}.pth']
    )
    assert template.cfg_options == {'default_hooks.checkpoint.filename_tmpl': 'epoch_{}.pth'}
