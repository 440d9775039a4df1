"""wsbcn_mm.openmmlab.data.reading: a file that cannot be read is named, and what to do."""

import pytest

pytest.importorskip('mmdet', reason='reads images as it does')
pytest.importorskip('mmseg', reason='reads masks as it does')

import json

import cv2
import numpy as np
from mmengine.dataset.base_dataset import Compose
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from wsbcn_mm.openmmlab.data import reading


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / 'a.jpg'
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    return path


@pytest.mark.parametrize('content', [b'', b'not a picture', None])
def test_an_unreadable_image_is_named(picture, content):
    if content is None:
        picture.unlink()
    else:
        picture.write_bytes(content)
    init_default_scope('mmdet')
    pipeline = Compose([dict(type='LoadImageFromFile')])
    with pytest.raises(reading.DataError) as error:
        pipeline(dict(img_path=str(picture)))
    assert f'reading {picture} failed' in str(error.value)
    assert 'restore the file, or take it out' in str(error.value)


def test_a_step_that_mixes_images_and_settings_that_contradict(picture):
    mask = picture.with_suffix('.png')
    cv2.imwrite(str(mask), np.zeros((40, 50), np.uint8))
    data = dict(img_path=str(picture), seg_map_path=str(mask), seg_fields=[], label_map=None)
    load = dict(type='LoadImageFromFile')
    for scope, steps, words in (
        ('mmdet', [load, dict(type='Mosaic')], 'Mosaic mixes .* MultiImageMixDataset gives it'),
        (
            'mmseg',
            [load, dict(type='LoadAnnotations', reduce_zero_label=True)],
            'it failed in LoadAnnotations: correct its arguments',
        ),
    ):
        init_default_scope(scope)
        with pytest.raises(reading.DataError, match=words):
            Compose(steps)(dict(data, reduce_zero_label=False))


LOAD = dict(type='LoadImageFromFile')
VOLUME = dict(type='LoadBiomedicalImageFromFile', decode_backend='numpy')


class Empty(LocalBackend):
    """A storage that answers as LMDB does for a key that it lacks."""

    def get(self, filepath):
        return None


register_backend('no_such', Empty, force=True)


@pytest.mark.parametrize(
    'suffix, steps, words',
    [
        ('.tif', [LOAD], "is a TIFF which this .* imdecode_backend='tifffile' reads it"),
        ('.jpg', [dict(LOAD, imdecode_backend='tifffile')], 'needs the package tifffile'),
        (
            '.jpg',
            [dict(LOAD, backend_args=dict(backend='tifffile'))],
            "decodes images and is no storage: write imdecode_backend='tifffile'",
        ),
        ('.jpg', [dict(type='LoadImageFromNDArray')], 'array already: LoadImageFromFile reads'),
        ('.jpg', [dict(LOAD, backend_args=dict(backend='no_such'))], 'has nothing of this name'),
        ('.npy', [VOLUME, dict(type='PackSegInputs')], 'is an array of 1 x 7 x 6 x 5 there'),
    ],
)
def test_images_of_many_channels(picture, suffix, steps, words, monkeypatch):
    if suffix == '.npy':
        np.save(picture.with_suffix('.npy'), np.zeros((7, 6, 5), np.float32))
    if suffix == '.tif':  # of a kind that neither OpenCV nor Pillow knows
        picture.with_suffix('.tif').write_bytes(b'II*\0' + bytes(50))
    monkeypatch.setattr(reading, 'find_spec', lambda name: None)  # as where it is not installed
    init_default_scope('mmseg')
    with pytest.raises(reading.DataError, match=words):
        Compose(steps)(dict(img_path=str(picture.with_suffix(suffix))))


@pytest.mark.parametrize('content', [b'', b'\x89PNG\r\n\x1a\nbroken off'])
def test_an_unreadable_mask_is_named(picture, content):
    mask = picture.with_suffix('.png')
    mask.write_bytes(content)
    init_default_scope('mmseg')
    pipeline = Compose([dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')])
    data = dict(
        img_path=str(picture),
        seg_map_path=str(mask),
        seg_fields=[],
        label_map=None,
        reduce_zero_label=False,
    )
    with pytest.raises(reading.DataError, match=f'a.jpg or .*{mask.name} failed'):
        pipeline(data)


POLYGON = [1, 1, 5, 1, 5, 5]


@pytest.mark.parametrize(
    'mask, words',
    [
        ({}, 'is missing or empty'),
        (POLYGON, 'is one list of numbers'),
        ('[[1, 1, 5, 1, 5, 5]]', 'is a str'),
        ([[[1, 1]] * 6], 'holds something else than numbers'),
        (dict(size=[50, 40], counts=[2000]), r'is an RLE of size \[50, 40\], and the image'),
        ([POLYGON], None),
        (dict(size=[40, 50], counts=[2000]), None),
    ],
)
def test_a_segmentation_that_is_none_is_said(picture, mask, words):
    init_default_scope('mmdet')
    pipeline = Compose([dict(type='LoadAnnotations', with_mask=True)])
    whole = dict(bbox=[0, 0, 9, 9], bbox_label=0, ignore_flag=0, mask=[POLYGON])
    wrong = {k: v for k, v in dict(whole, mask=mask).items() if v}
    wrong |= dict(bbox_label=0, ignore_flag=0)
    data = dict(img_path=str(picture), instances=[whole, wrong], ori_shape=(40, 50))
    data |= dict(height=40, width=50)
    if words is None:
        pipeline(data)
        return
    with pytest.raises(reading.DataError, match=f'object 1 of it, .*: its segmentation {words}'):
        pipeline(data)


@pytest.mark.parametrize(
    'name, words',
    [
        ('folder\\a.jpg', 'the name has a backslash: write /'),
        ('http://somewhere/a.jpg', 'the name is an address'),
        ('A.JPG', 'did you mean a.jpg?'),
        ('a', 'did you mean a.jpg?'),
        ('a.jpg.jpg', 'did you mean a.jpg?'),
        ('b.jpg', 'did you mean b_mask.jpg?'),
        ('a_1.jpg', 'restore the file'),
        ('.jpg', 'take the empty line out'),
        ('\ufeffa.jpg', 'byte order mark'),
        ('images/a.jpg', 'there is no folder'),
        ('link.jpg', 'it is a link to /nowhere'),
    ],
)
def test_what_a_missing_file_may_mean(picture, name, words):
    (picture.parent / 'link.jpg').symlink_to('/nowhere')
    (picture.parent / 'b_mask.jpg').touch()
    init_default_scope('mmdet')
    with pytest.raises(reading.DataError) as error:
        Compose([dict(type='LoadImageFromFile')])(dict(img_path=f'{picture.parent}/{name}'))
    assert words in str(error.value)


@pytest.mark.parametrize(
    'content, words',
    [(b'', 'is empty'), (b'<html>', "is text that begins with '<html>'"), ('F', 'image of mode F')],
)
def test_what_an_unreadable_image_is(picture, content, words):
    if content == 'F':
        Image.new('F', (4, 4)).save(picture, 'TIFF')
    else:
        picture.write_bytes(content)
    init_default_scope('mmdet')
    with pytest.raises(reading.DataError, match=f'{picture} (is a TIFF )?{words}'):
        Compose([dict(type='LoadImageFromFile')])(dict(img_path=str(picture)))


def test_errors_that_are_not_about_a_file_stay_as_they_are():
    def broken(data):
        raise KeyError('something')

    with pytest.raises(KeyError):
        Compose([broken])(dict(a=1))
    assert Compose([lambda data: dict(data, b=2)])(dict(img_path='x')) == dict(img_path='x', b=2)


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_a_data_set_that_finds_nothing_says_where(scope, tmp_path):
    (tmp_path / 'a.json').write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    (tmp_path / 'images').mkdir()
    (tmp_path / 'images/a.png').write_bytes(b'')
    init_default_scope(scope)
    if scope == 'mmdet':
        kind = dict(type='CocoDataset', ann_file='a.json', data_prefix=dict(img='images'))
        kind |= dict(filter_cfg=dict(filter_empty_gt=True), metainfo=dict(classes=('disc',)))
        words = rf'{tmp_path}/a\.json, .*images\n.*filter_empty_gt.*objects of disc'
    else:
        kind = dict(type='BaseSegDataset', data_prefix=dict(img_path='images'), img_suffix='.jpg')
        words = rf"{tmp_path}/images\n  img_suffix='\.jpg': do the names end like that"
    with pytest.raises(reading.DataError, match=rf'has no image: {words}'):
        DATASETS.build(dict(kind, data_root=str(tmp_path)))


# ----------------------------------------------------------------------------------------------
# tools/train.py
