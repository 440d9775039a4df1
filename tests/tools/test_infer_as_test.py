"""infer.py finds what test.py finds, bit for bit, whatever the images are and the config says."""

import pytest

pytest.importorskip('mmdet', reason='detectors are built from it')
pytest.importorskip('mmseg', reason='segmenters are built from it')

import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle

from tests.openmmlab.deploy.models import QUICK, as_trained
from tests.tool import tool
from wsbcn_mm.openmmlab import config
from wsbcn_mm.openmmlab.deploy import inference

pytestmark = pytest.mark.filterwarnings('ignore')  # of the hosts about their own futures

SHAPE = (64, 80)
NAMES = ('square', 'disc', 'ring', 'cross', 'bar')


def pixels(channels=3, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).integers(0, 8, (8, 10, channels)).astype(np.float64)
    large = cv2.resize(values, SHAPE[::-1], interpolation=cv2.INTER_NEAREST)
    return (large * (np.iinfo(dtype).max / 7)).astype(dtype)


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    Image.fromarray(pixels()).save(path, exif=exif)


def palette(path):
    image = Image.fromarray(pixels(1) // 64)
    image.putpalette(pixels(3, seed=1)[::8, ::8].ravel()[:12].tolist())
    image.save(path)


def written(channels=3, dtype=np.uint8):
    return lambda path: cv2.imwrite(str(path), pixels(channels, dtype))


EIGHT_BIT = {
    'colour.jpg': written(),
    'grey.png': written(1),
    'alpha.png': written(4),
    'palette.png': palette,
    'turned.jpg': turned,
    'sixteen.png': written(3, np.uint16),
}
UNCHANGED = dict(color_type='unchanged', to_float32=True)
# How images are loaded: the files, the arguments of LoadImageFromFile, the channels. That every
# kind of file is read the same is shown by tests/openmmlab/deploy/test_predict.py in all pairs.
IGNORED = dict(color_type='color_ignore_orientation')
KINDS = {
    'colour': (EIGHT_BIT, {}, 3),
    'grey, by pillow': (
        EIGHT_BIT | {'sixteen.png': written()},
        dict(color_type='grayscale', imdecode_backend='pillow'),
        1,
    ),
    '16 bit, four channels': ({'a.tif': written(4, np.uint16), 'b.png': written(4)}, UNCHANGED, 4),
    # A special data set: concatenated; for masks, the label zero is reduced.
    'special': ({'a.png': written(), 'b.png': written(1), 'turned.jpg': turned}, IGNORED, 3),
}


def run(name, *arguments):
    done = tool(f'{name}.py', *arguments)
    assert done.returncode == 0, done.stderr[-3000:]


def write_config(folder, name, dataset, evaluator, channels):
    mean, std = ([100.0] * channels, [60.0] * channels) if channels < 4 else (None, None)
    norm = dict(mean=mean, std=std, bgr_to_rgb=channels == 3)  # mmengine knows 1 and 3 values
    (folder / 'config.py').write_text(
        f'_base_ = {str(QUICK[name])!r}\n'
        f'model = dict(data_preprocessor=dict({", ".join(f"{k}={v}" for k, v in norm.items())}), '
        f'backbone=dict(in_channels={channels}))\n'
        f'test_dataloader = dict(dataset=dict(_delete_=True, **{dataset!r}))\n'
        f'test_evaluator = {evaluator!r}\n'
    )
    torch.manual_seed(0)
    model = as_trained(inference.build_model(config.load_config(f'{folder}/config.py')))
    if name == 'mask_rcnn':  # scores above the threshold: something to find
        model.roi_head.bbox_head.fc_cls.weight.data *= 40
    torch.save(dict(state_dict=model.state_dict(), meta={}), folder / 'model.pth')
    return folder / 'config.py', folder / 'model.pth'


def detection(folder, files, loading):
    """In COCO's layout, with categories in another order than the config's classes."""
    images = [
        dict(id=10 + i, file_name=n, height=SHAPE[0], width=SHAPE[1]) for i, n in enumerate(files)
    ]
    categories = [dict(id=3 * i + 2, name=n) for i, n in enumerate(reversed(NAMES))]
    truth = dict(bbox=[8, 8, 30, 30], area=900, iscrowd=0, segmentation=[[8, 8, 38, 8, 38, 38]])
    annotations = [
        dict(truth, id=i + 1, image_id=image['id'], category_id=categories[i % 5]['id'])
        for i, image in enumerate(images)
    ]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / 'a.json').write_text(json.dumps(content))
    keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
    return dict(
        type='CocoDataset',
        data_root=str(folder),
        ann_file='a.json',
        data_prefix=dict(img='images'),
        test_mode=True,
        metainfo=dict(classes=NAMES),
        pipeline=[
            dict(type='LoadImageFromFile', **loading),
            dict(type='Resize', scale=(96, 64), keep_ratio=True),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            dict(type='PackDetInputs', meta_keys=keys),
        ],
    )


def segmentation(folder, files, loading):
    for name in files:
        mask = pixels(1) % 6
        Image.fromarray(mask).save(folder / f'{Path(name).stem}.png')
    return dict(
        type='BaseSegDataset',
        data_root=str(folder),
        ann_file='a.txt',
        data_prefix=dict(img_path='images', seg_map_path='.'),
        img_suffix='',
        seg_map_suffix='.png',
        metainfo=dict(classes=('background', *NAMES)),
        pipeline=[
            dict(type='LoadImageFromFile', **loading),
            dict(type='Resize', scale=(96, 64), keep_ratio=True),
            dict(type='PackSegInputs'),
        ],
    )


def special(kind, dataset):
    return dict(type='ConcatDataset', datasets=[dataset] * 2) if kind == 'special' else dataset


@pytest.mark.parametrize('kind', KINDS)
def test_masks_are_those_of_test_py(kind, tmp_path):
    files, loading, channels = KINDS[kind]
    (tmp_path / 'images').mkdir()
    for name, write in files.items():
        write(tmp_path / 'images' / name)
    (tmp_path / 'a.txt').write_text('\n'.join(files))
    reduced = kind == 'special'
    dataset = segmentation(tmp_path, files, loading) | dict(reduce_zero_label=reduced)
    dataset = special(kind, dataset)
    evaluator = dict(type='IoUMetric', format_only=True)
    cfg, checkpoint = write_config(tmp_path, 'deeplabv3', dataset, evaluator, channels)
    run('test', cfg, checkpoint, '--work-dir', tmp_path / 'w', '--out', tmp_path / 'tested')
    run('infer', cfg, checkpoint, tmp_path / 'images', '-o', tmp_path / 'found', '--no-fold')
    for name in files:
        found = np.asarray(Image.open(tmp_path / f'found/masks/{Path(name).stem}.png'))
        tested = np.asarray(Image.open(tmp_path / f'tested/{Path(name).stem}.png'))
        assert np.array_equal(found, tested), name
        assert found.min() >= reduced and len(np.unique(found)) > 1
        assert (tmp_path / f'found/pictures/{Path(name).stem}.jpg').is_file()


@pytest.mark.parametrize('kind', KINDS)
def test_boxes_are_those_of_test_py(kind, tmp_path):
    files, loading, channels = KINDS[kind]
    (tmp_path / 'images').mkdir()
    for name, write in files.items():
        write(tmp_path / 'images' / name)
    dataset = special(kind, detection(tmp_path, files, loading))
    evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'a.json'), metric='bbox')
    cfg, checkpoint = write_config(tmp_path, 'mask_rcnn', dataset, evaluator, channels)
    run('test', cfg, checkpoint, '--work-dir', tmp_path / 'w', '--out', tmp_path / 'tested.pkl')
    given = ('--annotations', tmp_path / 'a.json', '--no-fold', '--no-pictures')
    run('infer', cfg, checkpoint, tmp_path / 'images', '-o', tmp_path / 'found', *given)
    found = json.loads((tmp_path / 'found/predictions.json').read_text())['annotations']
    with (tmp_path / 'tested.pkl').open('rb') as file:
        tested = {sample['img_id']: sample['pred_instances'] for sample in pickle.load(file)}
    categories = json.loads((tmp_path / 'a.json').read_text())['categories']
    assert len(tested) == len(files) and sum(len(s['scores']) for s in tested.values()) > 0
    for image_id, expected in tested.items():
        entries = [a for a in found if a['image_id'] == image_id]
        # Labels are numbers in the order of the annotation file.
        ids = [categories[label]['id'] for label in expected['labels'].tolist()]
        assert [a['category_id'] for a in entries] == ids
        assert [a['score'] for a in entries] == expected['scores'].tolist()
        boxes = [[a, b, c - a, d - b] for a, b, c, d in expected['bboxes'].tolist()]
        assert [a['bbox'] for a in entries] == boxes
        for entry, mask in zip(entries, expected['masks']):
            assert entry['segmentation']['counts'] == mask['counts'].decode()
            assert np.array_equal(rle.decode(entry['segmentation']), rle.decode(mask))


def test_without_test_data_the_validation_data_say_how_images_are_read(tmp_path):
    (tmp_path / 'images').mkdir()
    written()(tmp_path / 'images/a.png')
    dataset = detection(tmp_path, ['a.png'], {})
    evaluator = dict(type='CocoMetric', ann_file=str(tmp_path / 'a.json'), metric='bbox')
    cfg, checkpoint = write_config(tmp_path, 'mask_rcnn', dataset, evaluator, 3)
    other = tmp_path / 'other.py'
    other.write_text(
        f'_base_ = {str(cfg)!r}\n'
        'val_dataloader = {{_base_.test_dataloader}}\n'
        'test_dataloader = test_cfg = test_evaluator = None\n'
    )
    found = []
    for file in (cfg, other):
        out = tmp_path / file.stem
        run('infer', file, checkpoint, tmp_path / 'images', '-o', out, '--no-pictures')
        found.append((out / 'predictions.json').read_text())
    assert found[0] == found[1] and json.loads(found[0])['annotations']
    done = tool('test.py', other, checkpoint, '--work-dir', tmp_path / 'w')
    assert done.returncode == 1 and 'no test_dataloader' in done.stderr
