"""DataCheckHook: what everybody gets wrong once, and never in the way of what works."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

import json
import re
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from wsbcn_mm.openmmlab import annotations, data_check, data_samples, segments
from wsbcn_mm.openmmlab.compat import DataError
from wsbcn_mm.openmmlab.data_check import check_dataset
from wsbcn_mm.openmmlab.hooks.data import DataCheckHook
from wsbcn_mm.openmmlab.hooks.estimates import EstimatesHook


class Head(nn.Module):
    def __init__(self, num_classes, **settings):
        super().__init__()
        self.num_classes = num_classes
        for key, value in settings.items():
            setattr(self, key, value)


class EdgeHead(Head):
    def loss_by_feat(self, seg_logits, batch_data_samples):
        """That it has one is what counts."""


class RPNHead(Head):
    pass


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
        self.item = dict(instances=[dict(bbox=[0, 0, 9, 9], ignore_flag=0)])
        self.metainfo, self.size, self.masks = dict(classes=classes), size, masks
        if 'thing_classes' in settings:
            self.metainfo['thing_classes'] = settings.pop('thing_classes')
        steps = settings.pop('steps', [LoadAnnotations()])
        self.pipeline = SimpleNamespace(transforms=steps)
        if masks is not None:
            self.seg_map_suffix, self.label_map, self.reduce_zero_label = '.png', None, False
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
        if self.masks is not None:
            return dict(img_path='a.jpg', seg_map_path=__file__, mask=self.masks[index])
        return self.item


class LoadImageFromFile:
    """An image of 20 x 10 pixels."""

    def __call__(self, info):
        return dict(info, img=np.zeros((10, 20, 3), np.uint8))


def boxes(width, height, *corners, **settings):
    """Data of a detector: the size that the annotations say, and boxes with a corner at 0, 0."""
    instances = [dict(bbox=[0, 0, *corner], ignore_flag=0) for corner in corners]
    item = dict(img_path='a.jpg', width=width, height=height, instances=instances)
    steps = [LoadImageFromFile(), LoadAnnotations()]
    return Data(cat_ids=[3, 7], item=item, steps=steps, **settings)


class CocoDataset(Data):
    """Named as MMDetection's."""

    def load_data_list(self):
        pass


class Sorted(CocoDataset):
    """Numbers the categories in an order of its own, as Objects365 does."""

    def load_data_list(self):
        pass


def labelled(label, **settings):
    """Data of a classifier."""
    return Data(item=dict(img_path='a.jpg', gt_label=label), **settings)


def mask(*labels):
    return np.array([labels], np.uint8)


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
    monkeypatch.setattr(data_check, 'print_log', lambda text, *_: said.append(text))
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
    'the background reduced': (
        Data(classes=('bg', 'a', 'b'), masks=[mask(0, 1, 255)], reduce_zero_label=True),
        "leaves out the label 0 .* and 'b' was in none",
    ),
}


@pytest.mark.parametrize('case', WARNED)
def test_what_may_be_meant_is_warned_of(case, monkeypatch):
    said = []
    monkeypatch.setattr(data_samples, 'print_log', lambda text, *_: said.append(text))
    dataset, words = WARNED[case]
    check_dataset(dataset, model_of(len(dataset.metainfo['classes'])))
    assert len(said) == 1 and re.search(words, said[0]), said


def loop(dataset, *metrics):
    loader = SimpleNamespace(dataset=dataset)
    return SimpleNamespace(dataloader=loader, evaluator=SimpleNamespace(metrics=metrics))


@pytest.mark.parametrize(
    'trained, validated, words',
    [
        (Data(), Data(classes=('disc',)), "'disc' is class 1 of Data .*, and class 0 of Data"),
        (
            Data(masks=[mask(0, 1)], reduce_zero_label=True),
            Data(masks=[mask(0, 1)]),
            'reduce_zero_label is True for Data .* and False for Data',
        ),
    ],
)
def test_training_and_validation_mean_the_same_by_a_label(trained, validated, words):
    runner = SimpleNamespace(model=model_of(), train_loop=loop(trained), val_loop=loop(validated))
    with pytest.raises(DataError, match=words):
        DataCheckHook().before_train(runner)
    runner.val_loop = loop(trained)
    DataCheckHook().before_train(runner)


def files(monkeypatch, **names):
    """As if the files ``a``, ``b`` had been read, with these categories."""
    read = {f'{f}.json': annotations.Read(n, segments.Segments()) for f, n in names.items()}
    monkeypatch.setattr(annotations, 'files_read', read)
    return read


def test_categories_are_numbered_by_the_files(monkeypatch):
    """Whatever the order of the names in the config."""
    read = files(monkeypatch, a=['square', 'disc'], b=['x', 'disc', 'square'])
    one, other = CocoDataset(cat_ids=[3, 7]), CocoDataset(cat_ids=[3, 7], ann_file='b.json')
    runner = SimpleNamespace(model=model_of(), train_loop=loop(one), val_loop=loop(other))
    with pytest.raises(DataError, match=r"'square' is class 0 of CocoDataset .*, and class 1 of"):
        DataCheckHook().before_train(runner)
    runner.val_loop = loop(Sorted(cat_ids=[3, 7], ann_file='b.json'))
    DataCheckHook().before_train(runner)
    runner.val_loop = loop(other)
    read['a.json'].names.reverse()
    DataCheckHook().before_train(runner)


@pytest.mark.parametrize(
    'trained, tested, says',
    [
        (['square', 'disc'], ['square', 'disc'], ''),
        (['disc', 'square'], ['square', 'disc'], "'disc' is class 0 of the checkpoint"),
        (None, ['square', 'disc'], ''),  # a checkpoint of others: its names alone
        (None, ['disc', 'square'], 'must have listed them as this one does'),
    ],
)
def test_a_checkpoint_and_the_test_data_mean_the_same_by_a_label(
    trained, tested, says, monkeypatch
):
    """Of COCO's layout; the config names the classes in the order square, disc."""
    said = []
    monkeypatch.setattr(data_check, 'print_log', lambda text, *_: said.append(text))
    read = files(monkeypatch, a=trained or [])
    data = CocoDataset(cat_ids=[3, 7])
    runner = SimpleNamespace(model=model_of(), train_loop=loop(data), val_loop=None)
    checkpoint = dict(meta=dict(dataset_meta=data.metainfo))
    hook = DataCheckHook()
    hook.before_train(runner)
    hook.before_save_checkpoint(runner, checkpoint)
    hook = DataCheckHook()
    hook.after_load_checkpoint(runner, checkpoint)
    read['a.json'].names[:] = tested
    runner.test_loop = loop(data)
    said.clear()
    if trained and says:
        with pytest.raises(DataError, match=says):
            hook.before_test(runner)
        return
    hook.before_test(runner)
    assert (says in '\n'.join(said)) if says else not said
    assert tested == ['square', 'disc'] or 'labels are numbered as a.json lists' in said[0]


def test_a_checkpoint_and_other_data_mean_the_same_by_a_label():
    hook, runner = DataCheckHook(), SimpleNamespace(model=model_of(), test_loop=loop(Data()))
    for classes, is_right in (
        (('square', 'disc'), True),
        (('rectangle', 'circle'), True),  # other words
        ((), True),
        (('disc', 'square'), False),
    ):
        hook.after_load_checkpoint(runner, dict(meta=dict(dataset_meta=dict(classes=classes))))
        if is_right:
            hook.before_test(runner)
        else:
            with pytest.raises(DataError, match="'disc' is class 0 of the checkpoint"):
                hook.before_test(runner)


class LoadMasks(LoadAnnotations):
    def __init__(self, poly2mask=True):
        self.with_mask, self.poly2mask = True, poly2mask


@pytest.mark.parametrize(
    'kind, steps, metrics, words',
    [
        ('wrong', [LoadMasks()], (), 'the segmentation of annotation 4 is bad\n  write a list'),
        ('wrong', [LoadMasks(poly2mask=False)], (), None),  # left out, whatever they are
        ('wrong', [LoadAnnotations()], ('bbox',), None),
        ('wrong', [LoadAnnotations()], ('segm',), 'does not evaluate segm with a.json: .* is bad'),
        ('ends', [LoadAnnotations()], ('bbox', 'segm'), 'does not evaluate segm'),
        ('short', [LoadMasks()], ('segm',), None),
    ],
)
def test_masks_are_looked_at_where_they_are_used(kind, steps, metrics, words, monkeypatch):
    read = files(monkeypatch, a=['square', 'disc'])
    getattr(read['a.json'].segments, kind)[3].add(4, 'is bad')
    metric = SimpleNamespace(_coco_api=SimpleNamespace(imgs={4: dict(file_name='a.jpg')}))
    metric.metrics = metrics
    data = CocoDataset(cat_ids=[3, 7], steps=steps)
    data.item = dict(data.item, img_id=4, img_path='a.jpg')
    runner = SimpleNamespace(model=model_of(), test_loop=loop(data, metric))
    if words is None:
        DataCheckHook().before_test(runner)
        return
    with pytest.raises(DataError, match=words):
        DataCheckHook().before_test(runner)


@pytest.mark.parametrize(
    'poly2mask, words', [(True, 'it is left out'), (False, '2 objects are RLE')]
)
def test_masks_that_are_left_out(poly2mask, words, monkeypatch):
    said = []
    monkeypatch.setattr(data_check, 'print_log', lambda text, *_: said.append(text))
    found = files(monkeypatch, a=['square', 'disc'])['a.json'].segments
    found.encoded.update({3: 2, 9: 5})
    found.short[7 if poly2mask else 9].add(4, 'is bad')
    check_dataset(CocoDataset(cat_ids=[3, 7], steps=[LoadMasks(poly2mask)]), model_of())
    assert len(said) == 1 and words in said[0]


def test_an_evaluator_of_other_images():
    data = boxes(20, 10, (9, 9))
    data.item['img_id'] = 4
    runner = SimpleNamespace(model=model_of())
    for known, is_right in (
        ({4: dict(file_name='x/a.png')}, True),
        ({4: dict(file_name='b.jpg')}, False),
        ({5: dict(file_name='a.jpg')}, False),
        ({}, True),
    ):
        metric = SimpleNamespace(_coco_api=SimpleNamespace(imgs=known))
        runner.test_loop = loop(data, metric)
        if is_right:
            DataCheckHook().before_test(runner)
        else:
            with pytest.raises(DataError, match='annotations of other images'):
                DataCheckHook().before_test(runner)


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


class InfiniteSampler:
    """Named as mmengine's."""


class EpochBasedTrainLoop(SimpleNamespace):
    """Named as mmengine's."""


class IterBasedTrainLoop(SimpleNamespace):
    """Named as mmengine's."""


@pytest.mark.parametrize(
    'kind, sampler, ends',
    [
        (EpochBasedTrainLoop, InfiniteSampler(), False),
        (IterBasedTrainLoop, InfiniteSampler(), True),
        (EpochBasedTrainLoop, None, True),
    ],
)
def test_samplers_that_never_end(kind, sampler, ends):
    loader = SimpleNamespace(dataset=Data(), sampler=sampler)
    runner = SimpleNamespace(model=model_of(), train_loop=kind(dataloader=loader), val_loop=None)
    if ends:
        DataCheckHook().before_train(runner)
        return
    with pytest.raises(DataError, match='InfiniteSampler, never comes to an end'):
        DataCheckHook().before_train(runner)


def test_nothing_to_evaluate_on(monkeypatch):
    said = []
    monkeypatch.setattr(data_check, 'print_log', lambda text, *_: said.append(text))
    data = CocoDataset(cat_ids=[3, 7])
    for anns, format_only in (({}, True), ({5: dict(id=5)}, False), ({}, False)):
        assert not said
        read = SimpleNamespace(imgs={4: dict(file_name='a.jpg')}, anns=anns)
        data_check.check_evaluator(SimpleNamespace(_coco_api=read, format_only=format_only), data)
    assert len(said) == 1 and 'a.json has no annotations' in said[0]


@pytest.mark.parametrize(
    'module, topk, fits',
    [
        ('mmpretrain.evaluation', (1, 5), False),
        ('mmpretrain.evaluation', (1, 2), True),
        ('mmaction.evaluation', (1, 5), True),  # counts as many as there are
    ],
)
def test_more_answers_than_classes(module, topk, fits):
    metric = type('Accuracy', (), dict(__module__=module, topk=topk))()
    runner = SimpleNamespace(model=model_of(), test_loop=loop(Data(), metric))
    if fits:
        DataCheckHook().before_test(runner)
        return
    with pytest.raises(DataError, match=r'topk=\(1, 5\), and the model 2 classes'):
        DataCheckHook().before_test(runner)


def test_an_evaluator_with_other_boxes_for_the_same_names(monkeypatch):
    said = []
    monkeypatch.setattr(data_check, 'print_log', lambda text, *_: said.append(text))
    data = boxes(20, 10, (9, 9))
    data.item['img_id'] = 4
    for found, says in (([0, 0, 9, 9], 0), (None, 0), ([0, 0, 9, 8], 1)):
        read = SimpleNamespace(imgs={4: dict(file_name='a.jpg')}, anns={5: {}})
        read.imgToAnns = {4: [dict(bbox=found)]}
        data_check.check_evaluator(SimpleNamespace(_coco_api=read), data)
        assert len(said) == says
    assert 'has other boxes than a.json' in said[0]


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
