"""DataCheckHook: what everybody gets wrong once, and never in the way of what works."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

import json
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from wsbcn_mm.openmmlab.compat import DataError
from wsbcn_mm.openmmlab.hooks.data import DataCheckHook, check_dataset
from wsbcn_mm.openmmlab.hooks.estimates import EstimatesHook


class Head(nn.Module):
    def __init__(self, num_classes, **settings):
        super().__init__()
        self.num_classes = num_classes
        for key, value in settings.items():
            setattr(self, key, value)


def model_of(num_classes=2, **heads):
    return nn.ModuleDict(
        dict(
            backbone=Head(1),  # what a backbone was trained on is its own affair
            rpn_head=Head(1),
            bbox_head=Head(num_classes),
            **heads,
        )
    )


class LoadAnnotations:
    """Named as the transform of the hosts; takes the mask from the item."""

    def __call__(self, info):
        return dict(info, gt_seg_map=info['mask'])


class Data(torch.utils.data.Dataset):
    """What the hosts' data sets show of themselves."""

    ann_file = 'a.json'

    def __init__(self, classes=('square', 'disc'), size=3, masks=None, **settings):
        self.categories = settings.pop('categories', None)
        self.metainfo, self.size, self.masks = dict(classes=classes), size, masks
        if 'thing_classes' in settings:
            self.metainfo['thing_classes'] = settings.pop('thing_classes')
        if masks is not None:
            self.seg_map_suffix, self.label_map, self.reduce_zero_label = '.png', None, False
            self.pipeline = SimpleNamespace(transforms=[LoadAnnotations()])
        for key, value in settings.items():
            setattr(self, key, value)

    def in_folder(self, folder):
        """With its annotation file there."""
        if self.categories is not None:
            self.ann_file = str(folder / 'a.json')
            categories = [dict(id=i, name=name) for i, name in enumerate(self.categories)]
            (folder / 'a.json').write_text(json.dumps(dict(categories=categories)))
        return self

    def __len__(self):
        return len(self.masks) if self.masks is not None else self.size

    def get_data_info(self, index):
        return dict(img_path='a.jpg', seg_map_path=__file__, mask=self.masks[index])


def mask(*labels):
    return np.array([labels], np.uint8)


RIGHT = {
    'plain': (Data(), model_of()),
    'more classes than data': (Data(classes=('square',)), model_of()),
    'all categories': (Data(cat_ids=[3, 7]), model_of()),
    'no object of the last class': (Data(cat_ids=[3], categories=['square', 'x']), model_of()),
    'things and stuff': (Data(thing_classes=['disc'], classes=('disc', 'sky')), model_of(1)),
    'one logit for two classes': (
        Data(),
        nn.ModuleDict(dict(decode_head=Head(1, out_channels=1))),
    ),
    'class agnostic': (Data(), model_of(mask_head=Head(1, class_agnostic=True))),
    'no classes known': (Data(classes=None), model_of(0)),
    'masks': (Data(masks=[mask(0, 1, 255)]), model_of()),
    'no labels to test with': (Data(masks=[mask(255)]), model_of()),
    'objects are rare': (Data(masks=[mask(0, 255)] * 20 + [mask(0, 1)]), model_of()),
    'another label is ignored': (Data(masks=[mask(0, 9)]), model_of(head=Head(2, ignore_index=9))),
    'label zero reduced': (
        Data(masks=[mask(0, 255)] * 9, reduce_zero_label=True),
        model_of(),
    ),
}


@pytest.mark.parametrize('case', RIGHT)
def test_what_works_is_let_through(case, tmp_path):
    dataset, model = RIGHT[case]
    check_dataset(dataset.in_folder(tmp_path), model)


WRONG = {
    'no image': (
        Data(size=0, img_suffix='.jpeg', data_prefix=dict(img_path='images')),
        model_of(),
        r"(?s)no image.*images.*img_suffix='\.jpeg'",
    ),
    'a name that the file does not have': (
        Data(classes=('sqaure', 'disc'), cat_ids=[7], categories=['square', 'disc']),
        model_of(),
        r"(?s)a\.json has no category sqaure.*is it 'sqaure' for 'square'\?.*write the names",
    ),
    'the last name misspelt': (
        Data(classes=('square', 'disk'), cat_ids=[3], categories=['square', 'disc']),
        model_of(),
        r"(?s)no category disk, and its objects are left out.*is it 'disk' for 'disc'\?",
    ),
    'a name twice': (Data(classes=('disc', 'disc')), model_of(), "classes names 'disc' twice"),
    'no name that the file has': (
        Data(classes=('a', 'b'), cat_ids=[], categories=['square']),
        model_of(),
        'has no category a, b',
    ),
    'a comma is missing': (Data(classes='square'), model_of(), r"classes=\('square',\)"),
    'too few classes': (
        Data(),
        model_of(1),
        r'(?s)bbox_head has num_classes=1, Data has 2 classes.*set num_classes=2',
    ),
    'an RGB mask': (Data(masks=[np.zeros((4, 4, 3))]), model_of(), r'picture of shape \(4, 4, 3\)'),
    'a label without a class': (Data(masks=[mask(0, 2)]), model_of(), 'label 2, and .* 2 classes'),
    'the background reduced': (
        Data(masks=[mask(0, 255)] * 20, reduce_zero_label=True),
        model_of(),
        '(?s)with reduce_zero_label=True.*class 0 and "ignore" alone.*reduce_zero_label=False',
    ),
    'ignored alone': (Data(masks=[mask(255)] * 12), model_of(), 'hold 255 alone.*to learn'),
    '0 and 255': (Data(masks=[mask(0, 255)] * 12), model_of(), '0 and 255 alone'),
}


@pytest.mark.parametrize('case', WRONG)
def test_what_cannot_be_meant_is_said(case, tmp_path):
    dataset, model, words = WRONG[case]
    dataset.in_folder(tmp_path)
    with pytest.raises(DataError, match=words):
        check_dataset(dataset, model, learned=True)


def test_the_hook_looks_below_the_wrappers_and_at_every_loop():
    bad = torch.utils.data.ConcatDataset([Data(), Repeated(Data(size=0))])

    def runner(train, val=None, test=None):
        loops = (
            data and SimpleNamespace(dataloader=SimpleNamespace(dataset=data))
            for data in (train, val, test)
        )
        names = ('train_loop', 'val_loop', 'test_loop')
        return SimpleNamespace(model=model_of(), **dict(zip(names, loops)))

    hook = DataCheckHook()
    hook.before_train(runner(Data()))
    hook.before_train(runner([1, 2, 3]))  # any list is a data set for mmengine
    for train, val in ((bad, None), (Data(), bad)):
        with pytest.raises(DataError, match='no image'):
            hook.before_train(runner(train, val))
    with pytest.raises(DataError, match='no image'):
        hook.before_test(runner(None, test=bad))


class Repeated(torch.utils.data.Dataset):
    """A wrapper, as RepeatDataset is one."""

    def __init__(self, dataset):
        self.dataset, self.metainfo = dataset, dataset.metainfo

    def __len__(self):
        return 5


@pytest.mark.parametrize(
    'loader, images',
    [
        (dict(batch_size=4, batch_sampler=None), 4),
        (dict(batch_size=None, batch_sampler=SimpleNamespace(batch_size=3)), 3),
        (dict(batch_size=None, batch_sampler=SimpleNamespace(batch_size=[1, 2])), 1.5),
        (dict(batch_size=None, batch_sampler=[[0], [1]]), 1),
    ],
)
def test_images_of_a_step_whatever_the_sampler(loader, images):
    assert EstimatesHook._images_per_rank(SimpleNamespace(**loader)) == images
