"""Ways to write a config that mmengine runs, through what train.py and test.py add to it."""

import pytest

pytest.importorskip('mmengine', reason="the Runner is mmengine's")

import itertools

import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, METRICS, MODELS

from tests.openmmlab.tiny import TinyModel
from wsbcn_mm.openmmlab import command_line, config
from wsbcn_mm.openmmlab.hooks import loading
from wsbcn_mm.openmmlab.hooks.estimates import EstimatesHook


class SetUpModel(TinyModel):
    def __init__(self, wide=False):
        super().__init__()
        self.more = torch.nn.Linear(2, 2) if wide else None


MODELS.register_module(name='SetUpModel', module=SetUpModel, force=True)
_numbers = itertools.count()
OURS = ('AtomicCheckpointHook', 'EstimatesHook', 'StandardizationHook', 'CheckpointReportHook')


@DATASETS.register_module(force=True)
class SetUpImages(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.full((3, 6, 6), float(index)) + torch.eye(6))


@METRICS.register_module(force=True)
class SetUpMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(float(sum(s.mean() for s in data_samples)))

    def compute_metrics(self, results):
        return dict(mean=sum(results) / len(results))


@DATA_SAMPLERS.register_module(force=True)
class TakesTurns:
    """A batch sampler without a batch size: one image, then two."""

    def __init__(self, sampler, batch_size, drop_last):
        self.sampler, self.order = sampler, list(iter(sampler))

    def __iter__(self):
        yield from ([self.order[0]], self.order[1:3], [self.order[3]])

    def __len__(self):
        return 3


class Shown:
    """mmengine writes every config as text: an object in it must show itself as Python."""

    def __repr__(self):
        return f'{type(self).__name__}()'


class ShownEstimatesHook(Shown, EstimatesHook):
    pass


class ShownCheckpointHook(Shown, CheckpointHook):
    pass


class Counting(Shown, Hook):
    def __init__(self):
        self.steps = 0

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.steps += 1


def loader(shuffle=False, **settings):
    sampler = dict(type='DefaultSampler', shuffle=shuffle)
    basic = dict(dataset=dict(type='SetUpImages'), batch_size=1, num_workers=0, sampler=sampler)
    return basic | settings


def cfg_of(work_dir, **settings):
    return Config(
        dict(
            model=dict(type='SetUpModel'),
            work_dir=str(work_dir),
            train_dataloader=loader(),
            val_dataloader=loader(),
            test_dataloader=loader(),
            train_cfg=dict(by_epoch=True, max_epochs=1),
            val_cfg=dict(),
            test_cfg=dict(),
            val_evaluator=dict(type='SetUpMetric'),
            test_evaluator=dict(type='SetUpMetric'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
            experiment_name=f'set_up_{next(_numbers)}',
            log_level='ERROR',
            launcher='none',
        )
        | settings
    )


def train(cfg):
    """As tools/train.py does."""
    command_line.harden(cfg)
    config.add_hook(cfg, dict(type='EstimatesHook'))
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    config.add_hook(cfg, dict(type='DataCheckHook'))
    runner = command_line.build_runner(cfg)
    runner.train()
    return runner


def hooks_of(runner):
    return [type(hook).__name__ for hook in runner.hooks]


SET_UPS = {
    'plain': dict(),
    'a runner that is flexible': dict(
        runner_type='FlexibleRunner',
        strategy=dict(type='SingleDeviceStrategy'),
        env_cfg=dict(),
    ),
    'no default hooks': dict(default_hooks=None),
    'no checkpoints': dict(default_hooks=dict(checkpoint=None)),
    'a sampler without end': dict(
        train_dataloader=loader(sampler=dict(type='InfiniteSampler', shuffle=True)),
        train_cfg=dict(by_epoch=False, max_iters=4),
    ),
    'batches of turning sizes': dict(
        train_dataloader=loader(batch_sampler=dict(type='TakesTurns', drop_last=False)),
    ),
    'batch sizes that the data do not fill': dict(train_dataloader=loader(batch_size=3)),
}


@pytest.mark.parametrize('name', SET_UPS)
def test_a_set_up_is_trained_and_tested(name, tmp_path):
    settings = SET_UPS[name]
    runner = train(cfg_of(tmp_path, **settings))
    assert runner.iter > 0 and runner.model.bcn.bn.num_batches_tracked == runner.iter
    saved = sorted(tmp_path.glob('*.pth'))
    if name == 'no checkpoints':
        assert saved == []
        return
    assert len(saved) == 1 and {'AtomicCheckpointHook'} <= set(hooks_of(runner))
    cfg = cfg_of(tmp_path / 'test', **settings, load_from=str(saved[0]))
    config.add_hook(cfg, dict(type='CheckpointReportHook', strict=True))
    config.add_hook(cfg, dict(type='DataCheckHook'))
    assert command_line.build_runner(cfg).test()['mean'] == pytest.approx(
        runner.val_loop.run()['mean'], rel=1e-5
    )


def test_hooks_that_are_objects(tmp_path):
    """As scripts write them; what a tool adds must not stand twice."""
    counting, estimates, keeping = Counting(), ShownEstimatesHook(), ShownCheckpointHook()
    cfg = cfg_of(tmp_path, default_hooks=dict(checkpoint=keeping))
    cfg.custom_hooks = [counting, estimates]
    command_line.harden(cfg)
    assert cfg.custom_hooks == [counting, estimates]  # EstimatesHook is there already
    config.add_hook(cfg, dict(type='DataCheckHook'))
    runner = command_line.build_runner(cfg)
    runner.train()
    names = hooks_of(runner)
    assert [hook.steps for hook in runner.hooks if isinstance(hook, Counting)] == [4]
    assert {'ShownEstimatesHook', 'ShownCheckpointHook'} <= set(names)
    assert not {'EstimatesHook', 'AtomicCheckpointHook'} & set(names)


def resumed(work_dir, **settings):
    """A training of one epoch with settings, resumed with others."""
    ckpt = work_dir / 'epoch_1.pth'
    if not ckpt.is_file():
        train(cfg_of(work_dir, param_scheduler=dict(type='LinearLR', end=9)))
    basic = dict(train_cfg=dict(by_epoch=True, max_epochs=2), load_from=str(ckpt), resume=True)
    return cfg_of(
        work_dir, **(basic | dict(param_scheduler=dict(type='LinearLR', end=9)) | settings)
    )


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.1))), 'is of another optimizer'),
        (dict(model=dict(type='SetUpModel', wide=True)), 'is of another training: its optimizer'),
        (
            dict(train_cfg=dict(by_epoch=True, max_epochs=1)),
            r'nothing was left.*epochs=1, and .*_1',
        ),
        (
            dict(train_dataloader=loader(batch_size=9, drop_last=True)),
            'makes no batch of its 4 items: drop_last',
        ),
    ],
)
def test_what_cannot_be_resumed(settings, words, tmp_path):
    cfg = resumed(tmp_path, **settings)
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    with pytest.raises(SystemExit, match=rf'(?s)^error: .*{words}'):
        with command_line.errors_of_a_run(cfg):
            command_line.train(cfg)


def test_a_loop_by_iterations_that_gets_no_batch(tmp_path):
    cfg = cfg_of(
        tmp_path,
        train_cfg=dict(type='IterBasedTrainLoop', max_iters=2),
        train_dataloader=loader(batch_size=9, drop_last=True),
    )
    with pytest.raises(command_line.NothingToTrain, match='makes no batch of its 4 items'):
        command_line.train(cfg)


def test_what_goes_on_otherwise_than_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(loading, 'print_log', lambda text, *_: said.append(text))
    optimizer = dict(type='SGD', lr=0.5)
    schedulers = [dict(type='LinearLR', end=5)] * 2
    cfg = resumed(tmp_path, optim_wrapper=dict(optimizer=optimizer), param_scheduler=schedulers)
    config.add_hook(cfg, dict(type='CheckpointReportHook'))
    command_line.train(cfg)
    assert [text.partition('\n')[0] for text in said] == [
        'the checkpoint brings the settings of its optimizer along: '
        'initial_lr=0.01 (the config: 0.5)',
        'the checkpoint holds 1 schedulers, and this config has 2',
        'the checkpoint brings its schedule along: param_scheduler[0] has end=9 (the config: 5)',
    ]
    command_line.train(resumed(tmp_path, train_cfg=dict(by_epoch=True, max_epochs=1)), True)
