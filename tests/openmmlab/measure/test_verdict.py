"""wsbcn_mm.openmmlab.measure.verdict: what is said of a model."""

import pytest

pytest.importorskip('mmengine', reason='results are data elements of mmengine')

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.structures import InstanceData, PixelData

from wsbcn_mm.openmmlab.measure.verdict import Skill, loss_fallen, verdict


class Sample(dict):
    __getattr__ = dict.__getitem__


def masks(predicted, truth):
    return Sample(
        pred_sem_seg=PixelData(data=torch.tensor([predicted])),
        gt_sem_seg=PixelData(data=torch.tensor([truth])),
    )


def skill(*samples):
    found = Skill()
    found.add(list(samples))
    return found.value()


def test_the_commonest_class_alone_is_no_skill():
    truth = [[0, 0, 0, 1], [0, 0, 1, 255]]
    nothing = [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert skill(masks(nothing, truth)) == 0
    assert skill(masks(truth, truth)) == 1
    half = [[0, 0, 0, 1], [0, 0, 0, 0]]  # 6 of 7 right, 5 of them without knowing anything
    assert skill(masks(half, truth)) == pytest.approx(0.5)
    assert skill(masks(nothing, nothing)) == 1  # all is background, and said to be


def test_boxes_that_are_found():
    truth = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 10, 10], [20.0, 20, 40, 40]]), labels=torch.tensor([0, 1])
    )
    found = InstanceData(
        bboxes=torch.tensor([[1.0, 1, 10, 10], [20.0, 20, 40, 40], [20.0, 20, 40, 40]]),
        scores=torch.tensor([0.9, 0.1, 0.8]),
        labels=torch.tensor([0, 1, 0]),
    )
    sample = Sample(pred_instances=found, gt_instances=truth)
    assert skill(sample) == 0.5  # one with too low a score, one of another class
    assert skill(Sample(pred_instances=found[:0], gt_instances=truth)) == 0
    assert skill(Sample(pred_instances=found, gt_instances=InstanceData())) is None


def test_what_is_neither_is_not_judged():
    assert skill(torch.zeros(3)) is None


def test_the_fall_of_the_loss():
    buffer = HistoryBuffer(np.linspace(2, 1, 40), np.ones(40))
    hub = dict(message_hub=dict(log_scalars={'train/loss': buffer}))
    assert loss_fallen(hub) == pytest.approx(1 - 1.0384615 / 1.9615385)
    assert loss_fallen({}) is None and loss_fallen(dict(message_hub=dict(log_scalars={}))) is None


def test_a_model_that_learned_nothing_does_not_look_good():
    """Its channels are all alive and its estimates right, as those of any untrained network."""
    healthy = dict(dead_channels=0.0, drift_share=0.0, gradient_ratio=0.5)
    nothing = verdict(dict(healthy, skill=0.0, loss_fallen=0.4))
    good = verdict(dict(healthy, dead_channels=0.05, skill=0.7, loss_fallen=0.6))
    assert nothing[0].level == 'bad' and 'find_lr.py' in nothing[0].advice
    assert not any(finding.measure == 'dead_channels' for finding in nothing)
    assert {finding.level for finding in good} == {'good'}


@pytest.mark.parametrize(
    'summary, level, words',
    [
        (dict(loss_fallen=0.0), 'bad', 'did not move'),
        (dict(loss_fallen=-0.5), 'bad', 'did not move'),
        (dict(skill=0.1), 'doubtful', '10% is right'),
        (dict(skill=0.9, dead_channels=0.5), 'bad', '50% of the channels'),
        (dict(skill=0.9, drift_share=0.2), 'doubtful', 'running estimates of 20%'),
    ],
)
def test_thresholds(summary, level, words):
    worst = verdict(summary)[0]
    assert worst.level == level and words in str(worst) and worst.advice


def test_nothing_measured_is_nothing_said():
    assert verdict({}) == []
