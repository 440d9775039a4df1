"""DataCheckHook: two data sets, and a data set with its masks, its loop and its evaluator."""

import pytest

pytest.importorskip('mmengine', reason="the hook is mmengine's")

from types import SimpleNamespace

import torch

from tests.openmmlab.data.data_sets import (
    CocoDataset,
    Data,
    LoadAnnotations,
    LoadImageFromFile,
    Sorted,
    boxes,
    files,
    loop,
    mask,
    model_of,
)
from wsbcn_mm.openmmlab.data import check, samples
from wsbcn_mm.openmmlab.data.check import check_dataset
from wsbcn_mm.openmmlab.data.reading import DataError
from wsbcn_mm.openmmlab.hooks.data import DataCheckHook


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


def test_categories_are_numbered_by_the_files(monkeypatch):
    """Whatever the order of the names in the config."""
    read = files(monkeypatch, a=['square', 'disc'], b=['x', 'disc', 'square'])
    one, other = CocoDataset(cat_ids=[3, 7]), CocoDataset(cat_ids=[3, 7], ann_file='b.json')
    runner = SimpleNamespace(model=model_of(), train_loop=loop(one), val_loop=loop(other))
    with pytest.raises(DataError, match=r"'square' is class 0 of CocoDataset .*, and class 1 of"):
        DataCheckHook().before_train(runner)
    runner.val_loop, both = None, torch.utils.data.ConcatDataset([one, other])
    runner.train_loop = loop(both)
    with pytest.raises(DataError, match=r"'square' is class 0 of CocoDataset .*, and class 1 of"):
        DataCheckHook().before_train(runner)
    runner.train_loop = loop(one)
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
    monkeypatch.setattr(check, 'warn', said.append)
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
    monkeypatch.setattr(samples, 'warn', said.append)
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


def test_masks_that_are_written_over_others(monkeypatch):
    said = []
    monkeypatch.setattr(check, 'warn', said.append)
    one, other = (Data(size=1, item=dict(img_path=f'{f}/1.png')) for f in 'ab')
    for folder, datasets in ((None, [one, other]), ('out', [one]), ('out', [one, other])):
        assert not said
        check.check_names_of_masks(SimpleNamespace(output_dir=folder), datasets)
    assert len(said) == 1 and '1 of 2 masks are written over others' in said[0]


def test_nothing_to_evaluate_on(monkeypatch):
    said = []
    monkeypatch.setattr(check, 'warn', said.append)
    data = CocoDataset(cat_ids=[3, 7])
    for anns, format_only in (({}, True), ({5: dict(id=5)}, False), ({}, False)):
        assert not said
        read = SimpleNamespace(imgs={4: dict(file_name='a.jpg')}, anns=anns)
        check.check_evaluator(SimpleNamespace(_coco_api=read, format_only=format_only), data)
    assert len(said) == 1 and 'a.json has no annotations' in said[0]
    read = SimpleNamespace(imgs={4: dict(file_name='a.jpg')}, anns={0: dict(id=0)})
    check.check_evaluator(SimpleNamespace(_coco_api=read), data)
    assert len(said) == 2 and 'annotation of id 0' in said[1]


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


class IoUMetric:
    """Named as MMSegmentation's."""


def test_a_metric_that_needs_the_names_of_the_classes():
    runner = SimpleNamespace(model=model_of(), test_loop=loop(Data(), IoUMetric()))
    DataCheckHook().before_test(runner)
    runner.test_loop = loop(Data(classes=None), IoUMetric())
    with pytest.raises(DataError, match='has no names of classes, which IoUMetric needs'):
        DataCheckHook().before_test(runner)


def test_an_evaluator_with_other_boxes_for_the_same_names(monkeypatch):
    said = []
    monkeypatch.setattr(check, 'warn', said.append)
    data = boxes(20, 10, (9, 9))
    data.item['img_id'] = 4
    for found, says in (([0, 0, 9, 9], 0), (None, 0), ([0, 0, 9, 8], 1)):
        read = SimpleNamespace(imgs={4: dict(file_name='a.jpg')}, anns={5: {}})
        read.imgToAnns = {4: [dict(bbox=found)]}
        check.check_evaluator(SimpleNamespace(_coco_api=read), data)
        assert len(said) == says
    assert 'has other boxes than a.json' in said[0]


def test_masks_of_the_image_as_it_is_read(monkeypatch, tmp_path):
    """Whatever size the file says it has; that is said by itself."""
    (tmp_path / 'a.jpg').touch()
    wrong = files(monkeypatch, a=['square', 'disc'])['a.json'].segments.wrong[3]
    data = CocoDataset(cat_ids=[3, 7], steps=[LoadImageFromFile(), LoadMasks()])
    data.data_prefix = dict(img=str(tmp_path))
    wrong.add(4, 'is bad', dict(size=[10, 20], counts=[200]), 'a.jpg')
    check_dataset(data, model_of())
    wrong.mask = dict(size=[20, 10], counts=[200])
    with pytest.raises(DataError, match='is bad'):
        check_dataset(data, model_of())
