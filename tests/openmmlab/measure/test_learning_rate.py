"""wsbcn_mm.openmmlab.measure.learning_rate: the range test, and its tool."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, DATASETS, MODELS
from mmengine.runner import Runner, loops
from torch import nn
from torch.utils.data import BatchSampler

from wsbcn_mm.openmmlab.measure.learning_rate import averaged, range_test, rounded, suggest


@pytest.fixture(autouse=True)
def parts():
    """A model and a data set with names, as a config needs them; the batches that were seen."""
    from mmengine.model import BaseModel

    class RangeValley(BaseModel):
        def __init__(self, start=3.0):
            super().__init__()
            self.place = nn.Parameter(torch.tensor([start, start]))

        def forward(self, inputs, mode='loss', **_):
            seen.append([int(value) for value in inputs])
            return dict(loss=0.5 * (self.place**2 * torch.tensor([1.0, 4.0])).sum() + 1)

    class RangeNothing(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return dict(inputs=torch.tensor(index))

    seen = []
    MODELS.register_module(module=RangeValley)
    DATASETS.register_module(module=RangeNothing)
    DATA_SAMPLERS.register_module('RangeBatches', module=BatchSampler)
    yield seen
    MODELS.module_dict.pop('RangeValley')
    DATASETS.module_dict.pop('RangeNothing')
    DATA_SAMPLERS.module_dict.pop('RangeBatches')


def config(tmp_path, **rest):
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.02), **rest)
    return Config(
        dict(
            model=dict(type='RangeValley'),
            train_dataloader=dict(
                dataset=dict(type='RangeNothing'),
                batch_size=1,
                num_workers=0,
                sampler=dict(type='DefaultSampler', shuffle=True),
            ),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=wrapper,
            param_scheduler=[dict(type='MultiStepLR', milestones=[1])],
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1)),
            work_dir=str(tmp_path / 'work'),
        )
    )


def test_the_rate_rises_until_the_loss_does(tmp_path):
    cfg = config(tmp_path)
    before = cfg.to_dict()
    found = range_test(cfg, 1e-4, 10.0, 60)
    assert len(found.rates) == len(found.losses) == len(found.smooth) < 60  # it ended early
    step = math.log(10.0 / 1e-4) / 59
    for i, rate in enumerate(found.rates):
        assert rate == pytest.approx(1e-4 * math.exp(step * i))
    # Plain gradient descent on this quadratic diverges above 2 / 4, which takes it some steps.
    assert 0.05 <= found.suggestion <= 0.5
    assert cfg.to_dict() == before and not os.listdir(tmp_path)


def test_each_step_is_taken_at_its_rate(tmp_path):
    found = range_test(config(tmp_path), 1e-3, 0.1, 20)
    place = torch.tensor([3.0, 3.0])
    curvature = torch.tensor([1.0, 4.0])
    for rate, loss in zip(found.rates, found.losses, strict=True):
        assert loss == pytest.approx(0.5 * float((place**2 * curvature).sum()) + 1, rel=1e-5)
        place = place - rate * curvature * place


def test_accumulation_and_multipliers(tmp_path):
    """Two iterations make a step; a parameter at half the rate stays at half of it."""
    half = dict(custom_keys=dict(place=dict(lr_mult=0.5)))
    cfg = config(tmp_path, accumulative_counts=2, paramwise_cfg=half)
    found = range_test(cfg, 1e-3, 0.1, 20)
    place, curvature = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 4.0])
    for rate, loss in zip(found.rates, found.losses, strict=True):
        assert loss == pytest.approx(0.5 * float((place**2 * curvature).sum()) + 1, rel=1e-5)
        place = place - 0.5 * rate * curvature * place


def no_pause(seconds):
    pytest.fail('the test waits for its data')


@pytest.mark.parametrize(
    'settings',
    [
        dict(sampler=dict(type='DefaultSampler', shuffle=True)),
        dict(sampler=dict(type='DefaultSampler', shuffle=True), drop_last=True),
        dict(
            sampler=dict(type='DefaultSampler', shuffle=True),
            batch_sampler=dict(type='RangeBatches', drop_last=False),
        ),
        dict(sampler=dict(type='InfiniteSampler', shuffle=True)),
    ],
)
def test_data_begin_anew_as_they_do_in_a_training_and_without_a_pause(
    parts, tmp_path, monkeypatch, settings
):
    """Eight items, three a batch: order, seeds and the batch that is not full stay as they are."""
    monkeypatch.setattr(loops, 'time', SimpleNamespace(sleep=no_pause))
    cfg = config(tmp_path)
    cfg.randomness = dict(seed=7)
    cfg.train_dataloader.update(batch_size=3, **settings)
    range_test(cfg, 1e-3, 0.1, 20)
    loader, wanted, epoch = Runner.build_dataloader(cfg.train_dataloader, seed=7), [], 0
    batches = iter(loader)
    while len(wanted) < 20:
        batch = next(batches, None)
        if batch is None:  # as mmengine's loop by epochs has it
            epoch += 1
            getattr(loader.batch_sampler, 'sampler', loader.sampler).set_epoch(epoch)
            batches = iter(loader)
        else:
            wanted.append([int(value) for value in batch['inputs']])
    assert parts == wanted and parts[:3] != parts[3:6]


def test_data_that_make_no_batch_are_named(tmp_path):
    cfg = config(tmp_path)
    cfg.train_dataloader.update(batch_size=9, drop_last=True)
    with pytest.raises(ValueError, match='makes no batch of its 8 items: drop_last'):
        range_test(cfg)


@pytest.mark.parametrize('accumulate', [1, 4])
def test_a_first_loss_that_is_not_finite_is_named(tmp_path, accumulate):
    cfg = config(tmp_path)
    cfg.model.start = float('nan')
    cfg.optim_wrapper.accumulative_counts = accumulate
    with pytest.raises(ValueError, match='the loss of the first step is not finite'):
        range_test(cfg)


def test_averages_are_cut_off_at_the_ends():
    assert averaged([0.0, 3.0, 6.0, 9.0, 30.0], 3) == [1.5, 3.0, 6.0, 15.0, 19.5]


def test_suggestions():
    rates = [10 ** (-5 + i / 20) for i in range(101)]
    falls_until_hundredth = [2 - min(i, 60) / 60 + max(0, i - 60) / 10 for i in range(101)]
    assert suggest(rates, falls_until_hundredth) == 0.003  # a third of 0.01
    assert suggest(rates, [1.0] * 101) is None
    assert rounded(0.0031) == 0.003 and rounded(0.8) == 1.0 and rounded(0.0042) == 0.005


def test_arguments(tmp_path):
    with pytest.raises(ValueError, match='lowest'):
        range_test(config(tmp_path), 1.0, 0.1)
    with pytest.raises(ValueError, match='steps'):
        range_test(config(tmp_path), steps=5)
    cfg = config(tmp_path)
    cfg.optim_wrapper = dict(a=cfg.optim_wrapper)
    with pytest.raises(ValueError, match='one optimizer'):
        range_test(cfg)
