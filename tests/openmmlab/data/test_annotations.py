"""wsbcn_mm.openmmlab.data.annotations: what a COCO file lacks, and what is quietly lost of it."""

import pytest

pytest.importorskip('mmengine', reason="configs are mmengine's")
pytest.importorskip('pycocotools', reason='reads the files')

import copy
import json
import math
import re

from mmengine.config import Config
from pycocotools.coco import COCO

from wsbcn_mm.openmmlab import command_line
from wsbcn_mm.openmmlab.data import annotations, segments
from wsbcn_mm.openmmlab.data.reading import DataError

WHOLE = dict(
    images=[dict(id=4, file_name='a.png', height=2, width=2)],
    annotations=[dict(id=5, image_id=4, category_id=1, bbox=[0, 0, 2, 2.5], area=4, iscrowd=0)],
    categories=[dict(id=1, name='disc')],
)


def said_of(text, tmp_path):
    """What is said after a failure, of an annotation file with this text."""
    path = tmp_path / 'a.json'
    path.write_bytes(text if isinstance(text, bytes) else json.dumps(text).encode())
    cfg = Config(dict(test_dataloader=dict(dataset=dict(type='CocoDataset', ann_file=str(path)))))
    return annotations.damaged_annotations(cfg, 'test_dataloader')


def test_annotations_that_lack_something_are_named_after_a_failure(tmp_path):
    assert said_of(WHOLE, tmp_path) == []
    assert said_of({k: v for k, v in WHOLE.items() if k != 'annotations'}, tmp_path) == []
    for name, keys in annotations.ENTRIES.items():
        (entry,) = WHOLE[name]
        assert entry.keys() == keys.keys()
        for key in keys:
            part = {k: v for k, v in entry.items() if k != key}
            (line,) = said_of({**WHOLE, name: [dict(entry, id=77), part]}, tmp_path)
            first = 'number 1' if key == 'id' else f'id {entry["id"]}'
            assert f'has 1 {name} without {key!r} (first {first})\n  add it: ' in line
    (line,) = said_of({k: v for k, v in WHOLE.items() if k != 'categories'}, tmp_path)
    assert "has no list 'categories'" in line
    (line,) = said_of(b'\xef\xbb\xbf' + json.dumps(WHOLE).encode(), tmp_path)
    assert 'is damaged: Unexpected UTF-8 BOM' in line


def test_files_of_other_formats_lack_nothing(tmp_path):
    image, object_ = dict(WHOLE['images'][0]), dict(WHOLE['annotations'][0])
    del object_['iscrowd']
    lvis = dict(image, neg_category_ids=[], not_exhaustive_category_ids=[])
    assert said_of(dict(WHOLE, images=[lvis], annotations=[object_]), tmp_path) == []
    url = {k: v for k, v in lvis.items() if k != 'file_name'} | dict(coco_url='http://x/a.png')
    assert said_of(dict(WHOLE, images=[url], annotations=[object_]), tmp_path) == []
    panoptic = dict(image_id=4, file_name='a.png', segments_info=[])
    assert said_of(dict(WHOLE, annotations=[panoptic]), tmp_path) == []
    assert said_of(dict(WHOLE, annotations=[object_]), tmp_path) != []  # COCO's evaluation needs it


def test_what_a_module_lacks_is_no_matter_of_the_file():
    def read(action):
        try:
            exec('action()', dict(__name__='mmdet.evaluation.x', action=action))
        except Exception as error:  # noqa: BLE001
            return annotations.comes_from_annotations(error)

    assert read(lambda: {}['bbox'])
    assert not read(lambda: json.float)


@pytest.mark.parametrize('box', [None, [0, 0, 2], ['0', '0', '2', '2'], [0, 0, float('nan'), 2]])
def test_boxes_that_are_none_are_named_after_a_failure(box, tmp_path):
    annotation = dict(WHOLE['annotations'][0], bbox=box)
    (line,) = said_of(dict(WHOLE, annotations=[annotation]), tmp_path)
    assert 'has 1 annotations whose bbox is not [x, y, width, height]' in line
    assert f'id 5: {box!r}' in line


@pytest.mark.parametrize(
    'name, key, value',
    [
        ('images', 'width', '2'),
        ('images', 'height', None),
        ('images', 'file_name', None),
        ('annotations', 'area', '4'),
        ('annotations', 'iscrowd', 'no'),
        ('annotations', 'category_id', [1]),
    ],
)
def test_values_of_another_kind_are_named_after_a_failure(name, key, value, tmp_path):
    content = copy.deepcopy(WHOLE)
    content[name][0][key] = value
    (line,) = said_of(content, tmp_path)
    assert f'has 1 {name} whose {key} is not ' in line
    assert line.endswith(f'(first id {WHOLE[name][0]["id"]}: {value!r})')


@pytest.mark.parametrize(
    'content, words',
    [
        (b'', 'it is empty'),
        (b'file,x1,y1\n', "it begins with 'file,x1,y1', and COCO's JSON is read"),
        (dict(version='5.0', shapes=[]), "no list 'images', but version, shapes: COCO's format"),
        (dict(WHOLE, images=['a.png']), 'has 1 images that are no objects'),
    ],
)
def test_what_is_no_coco_file_is_said(content, words, tmp_path):
    assert words in said_of(content, tmp_path)[0]


def read(tmp_path, **changes):
    """Reads a file of two images with one object each, with entries added to its lists."""
    content = copy.deepcopy(WHOLE)
    content['images'].append(dict(content['images'][0], id=3, file_name='b.png'))
    content['annotations'].append(dict(content['annotations'][0], id=6, image_id=3))
    for name, entry in changes.items():
        content[name] = content[name] + [entry] if isinstance(entry, dict) else entry
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(content))
    with annotations.looked_at():
        COCO(str(file))
    assert set(annotations.files_read) == {str(file)}
    assert annotations.files_read[str(file)].names == [c['name'] for c in content['categories']]


IMAGE, OBJECT = WHOLE['images'][0], WHOLE['annotations'][0]


@pytest.mark.parametrize(
    'changes, words',
    [
        (
            dict(images=dict(IMAGE, file_name='c.png')),
            r'images of one id, .*id 4 \(a.png and c.png',
        ),
        (dict(annotations=dict(OBJECT, area=3)), 'annotations of one id, .*id 5\n'),
        (dict(annotations=[dict(OBJECT, image_id='4')]), "1 of 1 .* image_id '4', .* such as 4"),
        (dict(annotations=[dict(OBJECT, category_id=0)]), '1 of 1 .* category_id 0, .* such as 1'),
    ],
)
def test_what_is_lost_and_cannot_be_meant_is_refused(changes, words, tmp_path):
    with pytest.raises(DataError, match=words):
        read(tmp_path, **changes)
    assert COCO.__init__.__module__ == 'pycocotools.coco'  # as it was


@pytest.mark.parametrize(
    'changes, words',
    [
        (dict(annotations=dict(OBJECT, id=7, image_id=9)), ['1 of 3 annotations of images']),
        (dict(annotations=dict(OBJECT, id=7, category_id=9)), ['1 of 3 annotations of categories']),
        (dict(images=IMAGE), []),  # one image twice is one image
        (
            dict(annotations=dict(OBJECT, id=7, bbox=[0, 0, -2, 2])),
            [r'1 of 3 annotations whose box is none (id 7: [0, 0, -2, 2])'],
        ),
        (dict(annotations=dict(OBJECT, id=7, bbox=[0, 0, math.nan, 2])), ['(id 7: [0, 0, nan']),
        (dict(annotations=dict(OBJECT, id=7, bbox=[-math.inf, 0, 2, 2])), ['(id 7: [-inf, 0']),
        (dict(annotations=dict(OBJECT, id=7, bbox=[0, 0, 0, 2])), ['(id 7: [0, 0, 0, 2])']),
        (dict(annotations=[]), []),
        ({}, []),
    ],
)
def test_what_is_lost_and_may_be_meant_is_warned_of(changes, words, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(annotations, 'warn', said.append)
    read(tmp_path, **changes)
    assert len(said) == len(words) and all(w in text for w, text in zip(words, said))


@pytest.mark.parametrize(
    'mask, kinds, words',
    [
        ([[0, 0, 2, 0, 2, 2]], [], ''),
        ([[0, 0, 2, 0, 2, 2], [1, 1]], ['short'], 'has a polygon of 2 numbers, less than three'),
        ([[0, 0, 2, 0, 2, 2, 1]], ['short'], 'has a polygon of 7 numbers, which are no pairs'),
        ([[0, 0, 2, 2]], ['short', 'ends'], 'has a polygon of 4 numbers'),
        ([0, 0, 2, 0, 2, 2], ['wrong'], 'is one list of numbers'),
        ([], ['wrong'], 'is missing or empty'),
        (dict(size=[2, 3], counts=[2, 3, 1]), [], ''),
        (dict(size=[2, 3], counts='231'), [], ''),  # the same in short
        (
            dict(size=[3, 2], counts=[2, 3, 1]),
            ['wrong'],
            r'RLE of size \[3, 2\], .*has \[2, 3\]',
        ),
        (dict(size=[2, 3], counts=[2, 3]), ['wrong'], 'is an RLE of 5 pixels, and its .* has 6'),
        (dict(size=[2, 3], counts='23'), ['wrong'], 'is an RLE of 5 pixels'),
        (dict(size=[2, 3], counts=[7, -1]), ['wrong'], 'is an RLE of 6 pixels'),
        (dict(size=[2, 3]), ['wrong'], 'is an RLE whose counts are a NoneType'),
    ],
)
def test_segmentations_that_are_none_are_found(mask, kinds, words, tmp_path):
    """pycocotools fills up an RLE of too few pixels with what is in memory."""
    image = dict(id=4, file_name='a.png', height=2, width=3)
    read(tmp_path, images=[image], annotations=[dict(OBJECT, segmentation=mask)])
    (file,) = annotations.files_read.values()
    for kind in ('wrong', 'short', 'ends'):
        text = segments.said(getattr(file.segments, kind), [1])
        assert (text is not None) == (kind in kinds)
        assert text is None or re.search(f'^the segmentation of annotation 5 .*{words}', text), text
        assert segments.said(getattr(file.segments, kind), [2]) is None  # no category of these
    if not kinds:
        rle = COCO(str(tmp_path / 'a.json')).annToRLE(dict(OBJECT, segmentation=mask))
        assert rle['size'] == [2, 3]


def test_damaged_annotations_are_found(tmp_path):
    good, bad, odd = (tmp_path / f'{name}.json' for name in ('good', 'bad', 'odd'))
    good.write_text(json.dumps(dict(images=[], categories=[])))
    bad.write_text(json.dumps(dict(images=list(range(1000))))[:500])
    odd.write_text('[]')
    cfg = Config(
        dict(
            train_dataloader=dict(
                dataset=dict(
                    type='Repeat',
                    dataset=dict(data_root=str(tmp_path), ann_file='bad.json', type='CocoDataset'),
                )
            ),
            val_dataloader=dict(dataset=dict(type='CocoDataset', ann_file=str(good))),
            test_dataloader=dict(dataset=dict(type='CocoDataset', ann_file=str(odd))),
        )
    )
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    first, second = annotations.damaged_annotations(cfg, *loaders)
    assert first.startswith(f'train_dataloader: {bad} is damaged: ')
    assert second == f'test_dataloader: {odd} is damaged: a list instead of an object'
    assert annotations.damaged_annotations(cfg, 'val_dataloader') == []


def test_an_error_besides_damaged_annotations_is_not_swallowed(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{"images": [')
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='CocoDataset', ann_file=str(path)))))

    def run(action):
        with command_line.errors_of_a_run(cfg, 'train_dataloader'):
            action()

    words = rf'error: train_dataloader: {path} is damaged.*\n  it ended in JSONDecodeError: '
    with pytest.raises(SystemExit, match=words):
        run(lambda: json.loads(path.read_text()))
    with pytest.raises(DataError, match=r'(?s)ZeroDivisionError.*\nand besides.*damaged') as e:
        run(lambda: 1 / 0)
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    path.write_text('{"images": [], "categories": []}')
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(json.JSONDecodeError):
        run(lambda: json.loads('{'))
