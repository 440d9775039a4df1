"""wsbcn_mm.openmmlab.data.arriving: what reaches the model, as the pipeline leaves it."""

import pytest

pytest.importorskip('mmengine', reason='data samples are its')

import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from wsbcn_mm.openmmlab.data import arriving
from wsbcn_mm.openmmlab.data.arriving import IMAGES, Arriving
from wsbcn_mm.openmmlab.data.reading import DataError


class Filter:
    """A step that takes out what is smaller."""

    def __init__(self, least):
        self.least = least

    def __call__(self, data):
        kept = [b for b in data['gt_bboxes'] if b[2] - b[0] >= self.least]
        return dict(data, gt_bboxes=kept, chance=np.random.rand())


class Images:
    """One object of 9 pixels on each of four."""

    ann_file = 'a.json'

    def __init__(self, least=0, count=1):
        load = lambda info: dict(info, gt_bboxes=[o['bbox'] for o in info['instances']])  # noqa: E731
        self.pipeline = SimpleNamespace(transforms=[load, Filter(least)])
        self.count = count

    def __len__(self):
        return 4

    def get_data_info(self, index):
        box = dict(bbox=[0, 0, 9, 9], ignore_flag=0)
        return dict(img_path=f'{index}.png', instances=[box] * self.count)

    def sample(self, index):
        boxes = self.pipeline.transforms[1](dict(gt_bboxes=[[0.0, 0, 9, 9]] * self.count))
        return instances(boxes['gt_bboxes'], f'{index}.png')


def instances(boxes, path='a.png'):
    sample = BaseDataElement(metainfo=dict(img_path=path))
    sample.gt_instances = InstanceData(bboxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4))
    return sample


def masked(label):
    sample = BaseDataElement(metainfo=dict(img_path='a.png'))
    sample.gt_sem_seg = PixelData(data=torch.full((1, 2, 2), label))
    return sample


def said_by(monkeypatch):
    said = []
    monkeypatch.setattr(arriving, 'warn', said.append)
    return said


@pytest.mark.parametrize('shape', [lambda s: [s], lambda s: dict(sup=[s]), lambda s: [[s]]])
def test_a_training_without_an_object_names_the_step(shape, monkeypatch):
    """Said once, in time to stop; an error at the end, whose checkpoints nobody needs."""
    said, data = said_by(monkeypatch), Images(least=500)
    look = Arriving([data])
    state = np.random.get_state()[1].tolist()
    for index in range(IMAGES):
        assert not said
        look.before(dict(data_samples=shape(instances([], f'{index % 4}.png'))))
    assert np.random.get_state()[1].tolist() == state  # replayed, and chance goes on as before
    words = r'first 4 images .* a\.json has objects for 4 .*: Filter\(least=500\) of its pipeline'
    assert len(said) == 1 and re.search(words, said[0])
    look.before(dict(data_samples=shape(instances([]))))
    assert len(said) == 1
    with pytest.raises(DataError, match='nothing was learned in the whole training'):
        look.end()
    look.before(dict(data_samples=shape(instances([[0, 0, 1, 1]]))))  # one came in the end
    look.end()


@pytest.mark.parametrize(
    'data, sample, count',
    [
        (Images(count=0), instances([], '1.png'), 2 * IMAGES),  # there are none
        (Images(), instances([], '1.png'), IMAGES - 1),  # a short training
        (Images(), masked(1), 2 * IMAGES),  # stuff
        (Images(), BaseDataElement(), 2 * IMAGES),  # a classifier's
    ],
)
def test_nothing_is_said_of_what_may_be_meant(data, sample, count, monkeypatch):
    said, look = said_by(monkeypatch), Arriving([data])
    for _ in range(count):
        look.before(dict(data_samples=[sample]))
    look.end()
    assert not said


def test_an_object_among_the_first_ends_the_look(monkeypatch):
    said, data = said_by(monkeypatch), Images(least=500)
    look = Arriving([data])
    for index in range(2 * IMAGES):
        look.before(dict(data_samples=[instances([[0, 0, 1, 1]] if index == 9 else [], '1.png')]))
    look.end()
    assert not said


@pytest.mark.parametrize(
    'box, loss, words',
    [
        ([0, 0, float('inf'), 1], 1.0, r'a\.png has the box \[0, 0, inf, 1\] when it reaches'),
        ([float('nan'), 0, 1, 1], 1.0, r'has the box \[nan, 0, 1, 1\]'),
        ([float('inf'), 0, float('inf'), 1], 1.0, r'has the box \[inf, 0, inf, 1\]'),
        ([1, 0, 1, 1], float('nan'), r'the loss is nan, and a\.png has the box \[1, 0, 1, 1\]'),
        ([1, 0, 1, 1], 1.0, None),  # the host learns on
        ([0, 0, 1, 1], float('nan'), None),  # no matter of boxes
    ],
)
def test_boxes_that_are_none(box, loss, words):
    look = Arriving([Images()])

    def step():
        look.before(dict(data_samples=[instances([[0, 0, 1, 1]]), instances([box])]))
        look.after(dict(loss=torch.tensor(loss)))

    with nullcontext() if words is None else pytest.raises(DataError, match=words):
        step()
