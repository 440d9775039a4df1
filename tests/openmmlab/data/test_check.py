"""DataCheckHook: what everybody gets wrong once, and never in the way of what works."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

import re
from types import MappingProxyType, SimpleNamespace

import numpy as np
import torch
from torch import nn

from tests.openmmlab.data.data_sets import (
    Data,
    EdgeHead,
    Head,
    LoadAnnotations,
    LoadImageFromFile,
    RPNHead,
    boxes,
    labelled,
    loop,
    mask,
    model_of,
)
from wsbcn_mm.openmmlab.data import check, samples
from wsbcn_mm.openmmlab.data.check import check_dataset
from wsbcn_mm.openmmlab.data.reading import DataError
from wsbcn_mm.openmmlab.hooks.data import DataCheckHook
from wsbcn_mm.openmmlab.hooks.estimates import EstimatesHook

RIGHT = {
    'proposals alone': (Data(), nn.ModuleDict(dict(bbox_head=RPNHead(1)))),
    'edges beside the classes': (
        Data(tuple('abc')),
        model_of(3, auxiliary_head=nn.ModuleList([EdgeHead(2)])),
    ),
    'plain': (Data(), model_of()),
    'more classes than data': (Data(classes=('square',)), model_of()),
    'all categories': (Data(cat_ids=[3, 7]), model_of()),
    'no object of the last class': (Data(cat_ids=[3], categories=['square', 'x']), model_of()),
    'classes that no file has': (Data(cat_ids=[3], categories=['square']), model_of(1)),
    'things and stuff': (Data(thing_classes=['disc'], classes=('disc', 'sky')), model_of(1)),
    'one logit for two classes': (
        Data(),
        nn.ModuleDict(dict(decode_head=Head(1, out_channels=1))),
    ),
    'class agnostic': (Data(), model_of(mask_head=Head(1, class_agnostic=True))),
    'no classes known': (Data(classes=None), model_of(0)),
    'names under two keys': (Data(more=dict(CLASSES=('a', 'b'))), model_of()),
    'no names but under another key': (Data(None, more=dict(CLASSES=('a', 'b'))), model_of()),
    'masks': (Data(masks=[mask(0, 1, 255)]), model_of()),
    'names and their numbers': (
        Data(classes=dict(square=0, disc=1), masks=[mask(0, 1)]),
        model_of(),
    ),
    'masks in a storage': (
        Data(masks=[mask(0, 1)], mask_path='http://127.0.0.1:9/a.png'),
        model_of(),
    ),
    'no labels to test with': (Data(masks=[mask(255)]), model_of()),
    'objects are rare': (Data(masks=[mask(0, 255)] * 20 + [mask(0, 1)]), model_of()),
    'another label is ignored': (Data(masks=[mask(0, 9)]), model_of(head=Head(2, ignore_index=9))),
    'boxes at the edge': (boxes(20, 10, (21, 10)), model_of()),
    'no object to test with': (Data(cat_ids=[3, 7], item=dict(instances=[])), model_of()),
    'labels of an image': (labelled([0, 1]), model_of()),
    'no labels to test videos with': (labelled(-1), model_of()),
    'no objects to learn from a teacher': (
        Data(cat_ids=[3, 7], item=dict(instances=[]), cat_img_map={3: [1]}, steps=[]),
        model_of(),
    ),
    'other words for the folders': (labelled(0, folder_to_idx=dict(n01=0, n02=1)), model_of()),
    'label zero reduced': (
        Data(masks=[mask(0, 255)] * 9, reduce_zero_label=True),
        model_of(),
    ),
}


@pytest.mark.parametrize('case', RIGHT)
def test_what_works_is_let_through(case, tmp_path):
    dataset, model = RIGHT[case]
    check_dataset(dataset.in_folder(tmp_path), model, learned='to learn' in case)


class Official(Data):
    METAINFO = MappingProxyType(dict(classes=('person', 'dog')))

    def __init__(self, **settings):
        super().__init__(self.METAINFO['classes'], **settings)


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
    'names under a key of MMDetection 2': (
        Official(more=dict(CLASSES=('square', 'disc'))),
        model_of(),
        r"(?s)metainfo has CLASSES, .* are person, dog\n.*classes=\('square', 'disc'\)",
    ),
    'a name twice': (Data(classes=('disc', 'disc')), model_of(), "classes names 'disc' twice"),
    'a category twice': (
        Data(cat_ids=[3, 5, 7], categories=['square', 'square', 'disc']),
        model_of(),
        "two categories of the name 'square', and the labels of the classes behind it shift",
    ),
    'no object that counts': (
        Data(cat_ids=[3, 7], item=dict(instances=[dict(bbox=[0, 0, 9, 9], ignore_flag=1)])),
        model_of(),
        '(?s)no image of a.json has an object that counts.*iscrowd=1',
    ),
    'images that were resized': (
        boxes(40, 20, (38, 15)),
        model_of(),
        '(?s)3 of 3 images have another size .* is 20 x 10 .* are 40 x 20 there, and boxes lie b',
    ),
    'labels from 1': (labelled(2), model_of(), '(?s)label of a.jpg is 2, .* 2 classes.*from 0'),
    'no label': (labelled(-1), model_of(), '(?s)label of a.jpg is -1.*the list has no label'),
    'folders in another order': (
        labelled(0, folder_to_idx=dict(disc=0, square=1)),
        model_of(),
        "(?s)the folder disc is class 0, .* calls that 'square'.*order: disc, square",
    ),
    'a folder of an editor as a class': (
        labelled(0, classes=('a', 'b'), folder_to_idx={'.ipynb_checkpoints': 0, 'b': 1}),
        model_of(),
        '(?s)\\.ipynb_checkpoints is taken for a class.*remove the folder',
    ),
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
    'masks as JPEG': (Data(masks=[mask(0, 3)], mask_path='http://a/b.JPG'), model_of(), 'PNG$'),
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


@pytest.mark.parametrize(
    'heads, classes, loaded, words',
    [
        (80, ('square', 'disc', 'star'), False, 'bbox_head has num_classes=80, and Data 3 .square'),
        (80, ('square', 'disc', 'star'), True, None),  # may be COCO's own
        (3, ('square', 'disc', 'star'), False, None),
        (2, ('square',), False, None),  # a background beside it
        (80, (), False, None),
    ],
)
def test_classes_that_the_data_do_not_have(heads, classes, loaded, words, monkeypatch):
    """Said once, and no error; not where weights are loaded that may know them."""
    said = []
    monkeypatch.setattr(check, 'warn', said.append)
    hook, runner = DataCheckHook(), SimpleNamespace(val_loop=None, train_loop=loop(Data(classes)))
    runner.model = model_of(heads, mask_head=Head(heads))
    if loaded:
        hook.after_load_checkpoint(runner, {})
    hook.before_train(runner)
    assert len(said) == (words is not None) and all(re.search(words, text) for text in said)


WARNED = {
    'an image of another size': (boxes(40, 20, (9, 9)), '3 of 3 images have another size'),
    'boxes beyond the image': (boxes(20, 10, (30, 9), (9, 9), (9, 30)), r'not \[x1, y1, x2, y2\]'),
    'no object that counts': (
        Data(cat_ids=[3, 7], item=dict(instances=[]), cat_img_map={3: [1]}),
        'no image of a.json has an object that counts',
    ),
    'labels of other people': (labelled(5), 'label of a.jpg is 5, and the model has 2 classes'),
    'a mask of another size': (
        Data(masks=[mask(0, 1)], steps=[LoadImageFromFile(), LoadAnnotations()]),
        'the mask .* is 2 x 1, and its image 20 x 10',
    ),
    'a mask, and an image with its channels first': (
        Data(masks=[np.eye(20, 9, dtype=np.uint8)], steps=[LoadImageFromFile(), LoadAnnotations()]),
        '(?s)the mask .* is 9 x 20, and its image 20 x 10\n  are the 10 channels .* its first axis',
    ),
    'boxes, and an image with its channels first': (
        boxes(30, 20, (9, 9)),
        '3 of 3 images have another size .*\n  are the 10 channels of the image its first axis',
    ),
    'the background reduced': (
        Data(classes=('bg', 'a', 'b'), masks=[mask(0, 1, 255)], reduce_zero_label=True),
        "leaves out the label 0 .* and 'b' was in none",
    ),
}


@pytest.mark.parametrize('case', WARNED)
def test_what_may_be_meant_is_warned_of(case, monkeypatch):
    said = []
    monkeypatch.setattr(samples, 'warn', said.append)
    dataset, words = WARNED[case]
    check_dataset(dataset, model_of(len(dataset.metainfo['classes'])))
    assert len(said) == 1 and re.search(words, said[0]), said


@pytest.mark.parametrize(
    'name, is_right', [('square', True), ('sqare', False), ('star', True), ('', True)]
)
def test_classes_that_xml_files_write_otherwise(name, is_right, tmp_path):
    """A class that no file has is no mistake, unless one is written alike."""
    file = tmp_path / 'a.xml'
    object_ = '<object><name>{}</name></object>'
    file.write_text(f'<annotation>{object_.format("disc")}{object_.format(name)}</annotation>')
    data = Data(item=dict(xml_path=str(file), instances=[]))
    if is_right:
        check_dataset(data, model_of(), learned=True)
        return
    with pytest.raises(DataError, match="objects sqare, .*\\n  is it 'square' for 'sqare'"):
        check_dataset(data, model_of(), learned=True)


@pytest.mark.parametrize('has_mask', [True, False])
def test_images_that_an_editor_has_left_behind(has_mask, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(samples, 'warn', said.append)
    data = Data(masks=[mask(0, 1)], ann_file='', data_prefix=dict(img_path=str(tmp_path)))
    path = tmp_path / '.ipynb_checkpoints' / 'a-checkpoint.png'
    item = dict(img_path=str(path), seg_map_path=__file__ if has_mask else 'a', mask=mask(0, 1))
    data.get_data_info = lambda index: item
    if has_mask:
        check_dataset(data, model_of())
        assert len(said) == 1 and '1 of 1 images lie in' in said[0]
        return
    with pytest.raises(DataError, match='checkpoints, which an editor or a system has made'):
        check_dataset(data, model_of())


@pytest.mark.parametrize('box', [[9, 0, 4, 9], [4, 0, 4, 9], [0, float('nan'), 4, 9]])
def test_boxes_that_end_before_they_begin(box, monkeypatch):
    said = []
    monkeypatch.setattr(samples, 'warn', said.append)
    right, wrong = (dict(bbox=b, ignore_flag=0) for b in ([0, 0, 9, 9], box))
    data = Data(item=dict(xml_path='a.xml', instances=[right, dict(wrong, ignore_flag=1)]))
    check_dataset(data, model_of(), learned=True)
    assert not said  # ignored
    data.item['instances'].append(wrong)
    check_dataset(data, model_of(), learned=True)
    assert len(said) == 1 and 'a.xml has the box' in said[0]
    data.item['instances'] = [dict(right, ignore_flag=1)] * 2
    check_dataset(data, model_of(), learned=True)
    assert 'objects of the images looked at are to be ignored' in said[1]


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
