"""Damaged files and checkpoints that would run code: the error says which file and what to do."""

import pytest

pytest.importorskip('mmdet', reason='the tool trains a detector')
pytest.importorskip('mmseg', reason='reads masks as it does')

import json

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset.base_dataset import Compose
from mmengine.fileio import LocalBackend, register_backend
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from torch import nn
from yapf.yapflib.yapf_api import FormatCode

from tests.openmmlab.test_compat import Harmless, needs_allow_list
from tests.openmmlab.tiny import make_runner
from tests.tool import tool
from wsbcn_mm.openmmlab import command_line, config
from wsbcn_mm.openmmlab.checkpoints import CheckpointRefused
from wsbcn_mm.openmmlab.data import annotations, reading
from wsbcn_mm.openmmlab.deploy import inference
from wsbcn_mm.openmmlab.explain import ConfigError, named

QUICK = 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'


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


@pytest.mark.parametrize(
    'shapes, words',
    [
        ([(3, 32, 32), (3, 40, 32)], 'images of other sizes make no batch'),
        ([(1, 32, 32)], 'turns BGR to RGB .* gets images of 1 channels\n  .* in_channels=1'),
    ],
)
def test_images_that_the_preprocessor_does_not_take(shapes, words):
    cfg = config.load_config('configs/quick/quick_deeplabv3_r18_ws-bcn_1xb1_shapes.py')
    cfg.model.data_preprocessor = dict(type='SegDataPreProcessor', size=(40, 32), bgr_to_rgb=True)
    if len(shapes) == 1:
        cfg.model.data_preprocessor = dict(type='ImgDataPreprocessor', bgr_to_rgb=True)
    model = inference.build_model(cfg)
    inputs = [torch.zeros(shape, dtype=torch.uint8) for shape in shapes]
    with pytest.raises(ConfigError, match=words), named(cfg):
        model.test_step(dict(inputs=inputs, data_samples=[]))


def test_a_config_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr('mmengine.config.config.FormatCode', FormatCode)
    cfg = Config(dict(model=dict(type='A'), kind=nn.ReLU, values=np.ones(2)))
    with pytest.raises(ConfigError, match='kind is .*ReLU.*\n.*`del kind, values`'), named(cfg):
        str(cfg.pretty_text)


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


@needs_allow_list
def test_a_checkpoint_that_runs_code_is_refused_by_name(tmp_path):
    touched, file = tmp_path / 'touched', tmp_path / 'evil.pth'
    torch.save(dict(state_dict={}, payload=Harmless(str(touched))), file)
    for resume in (False, True):
        runner = make_runner(tmp_path / str(resume), load_from=str(file), resume=resume)
        with pytest.raises(CheckpointRefused) as error:
            runner.load_or_resume()
        text = str(error.value)
        assert f'{file} was refused: it holds more than tensors and numbers' in text
        assert 'open' in text  # what it asks for
        assert 'save its state_dict alone' in text
        assert '\n\n' not in text  # not torch's page of advice
    assert not touched.exists()


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
    with pytest.raises(
        reading.DataError, match=r'(?s)ZeroDivisionError.*\nand besides.*damaged'
    ) as e:
        run(lambda: 1 / 0)
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    path.write_text('{"images": [], "categories": []}')
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)
    with pytest.raises(json.JSONDecodeError):
        run(lambda: json.loads('{'))


# ----------------------------------------------------------------------------------------------
# tools/train.py


@pytest.fixture
def data(tmp_path):
    """A COCO folder with four images."""
    root = tmp_path / 'coco'
    for split in ('train2017', 'val2017'):
        (root / split).mkdir(parents=True)
    (root / 'annotations').mkdir()
    images, annotations = [], []
    for i in range(4):
        picture = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
        for split in ('train2017', 'val2017'):
            cv2.imwrite(str(root / split / f'{i}.jpg'), picture)
        images.append(dict(id=i, file_name=f'{i}.jpg', width=64, height=64))
        annotations.append(
            dict(
                id=i + 1,
                image_id=i,
                category_id=1,
                bbox=[8, 8, 40, 40],
                area=1600,
                iscrowd=0,
                segmentation=[[8, 8, 48, 8, 48, 48, 8, 48]],
            )
        )
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='thing')])
    for split in ('train2017', 'val2017'):
        path = root / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(content))
    return root


def options(data, *more):
    """Of the quick config: this dataset, one step per epoch and image."""
    return [
        '--cfg-options',
        'train_dataloader.dataset.type=CocoDataset',
        'val_dataloader.dataset.type=CocoDataset',
        'test_dataloader.dataset.type=CocoDataset',
        f'train_dataloader.dataset.data_root={data}/',
        f'val_dataloader.dataset.data_root={data}/',
        f'test_dataloader.dataset.data_root={data}/',
        "train_dataloader.dataset.metainfo.classes=('thing',)",
        "val_dataloader.dataset.metainfo.classes=('thing',)",
        f'val_evaluator.ann_file={data}/annotations/instances_val2017.json',
        'train_cfg.val_interval=99',
        'train_dataloader.dataset.indices=2',
        'model.roi_head.bbox_head.num_classes=1',
        'model.roi_head.mask_head.num_classes=1',
        *more,
    ]


def test_the_tool_resumes_from_the_last_complete_checkpoint(root, tmp_path, data):
    work = tmp_path / 'run'
    arguments = ('train.py', root / QUICK, '--work-dir', work, '--audit', 'off')
    assert tool(*arguments, *options(data, 'train_cfg.max_epochs=2')).returncode == 0
    last = work / 'epoch_2.pth'
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    again = tool(*arguments, '--resume', *options(data, 'train_cfg.max_epochs=2'))
    assert again.returncode == 0 and f'not resumed from: {last} is incomplete' in again.stderr
    log = ''.join(path.read_text() for path in work.glob('*/*.log'))
    assert 'resumed epoch: 1, iter: 2' in log + again.stderr + again.stdout
    assert torch.load(last, weights_only=True)['meta']['iter'] == 4  # written anew

    last.write_bytes(last.read_bytes()[:-10])
    refused = tool(*arguments, '--resume', last, *options(data))
    assert refused.returncode == 1
    assert f'error: the checkpoint {last} is incomplete' in refused.stderr


def test_the_tool_names_damaged_data(root, tmp_path, data):
    arguments = ('train.py', root / QUICK, '--work-dir', tmp_path / 'run', '--audit', 'off')
    picture = data / 'train2017' / '1.jpg'
    content = picture.read_bytes()
    picture.write_bytes(b'damaged')
    failed = tool(*arguments, *options(data))
    assert f'error: reading {picture} failed' in failed.stderr and failed.returncode == 1
    picture.write_bytes(content)
    annotations = data / 'annotations' / 'instances_train2017.json'
    annotations.write_text(annotations.read_text()[:200])
    failed = tool(*arguments, *options(data))
    assert f'error: train_dataloader: {annotations} is damaged: ' in failed.stderr
