"""What the hosts' data sets, heads and loops show of themselves, for the look at the data."""

import json
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from wsbcn_mm.openmmlab.data import annotations, segments


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
        self.metainfo |= settings.pop('more', {})
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
            path = getattr(self, 'mask_path', __file__)
            return dict(img_path='a.jpg', seg_map_path=path, mask=self.masks[index])
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


def loop(dataset, *metrics):
    loader = SimpleNamespace(dataset=dataset)
    return SimpleNamespace(dataloader=loader, evaluator=SimpleNamespace(metrics=metrics))


def files(monkeypatch, **names):
    """As if the files ``a``, ``b`` had been read, with these categories."""
    read = {f'{f}.json': annotations.Read(n, segments.Segments()) for f, n in names.items()}
    monkeypatch.setattr(annotations, 'files_read', read)
    return read
