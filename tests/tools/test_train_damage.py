"""tools/train.py with damaged files: checkpoints are passed over, data are named."""

import pytest

pytest.importorskip('mmdet', reason='trains a detector')

import json

import cv2
import numpy as np
import torch

from tests.tool import tool


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


QUICK = 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'
