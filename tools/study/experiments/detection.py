"""Instance segmentation: the small Mask R-CNN of configs/quick, run by mmengine's Runner."""

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from experiments import loop
from wsbcn_mm.diagnostics import ActivationObserver, singularities
from wsbcn_mm.openmmlab.config import load_config

CONFIG = Path(__file__).parents[3] / 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'
DATASETS = ('nuclei', 'shapes_instances')


class Recorder(Hook):
    """Keeps the training loss and the singularity measures."""

    priority = 'LOW'

    def __init__(self, steps: int) -> None:
        self.steps, self.losses, self.diverged = steps, [], False
        self.curve = {'step': [], 'loss': []}
        self.watched = {'step': []}
        self._observer = None

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Watches every twelfth part of the training."""
        if runner.iter % max(1, self.steps // 12) == 0 or runner.iter == self.steps - 1:
            self._observer = ActivationObserver(runner.model).__enter__()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        """Notes what was seen."""
        if self._observer is not None:
            self._observer.__exit__(None, None, None)
            self.watched['step'].append(runner.iter)
            for name, value in singularities(self._observer.layers()).items():
                self.watched.setdefault(name, []).append(value)
            self._observer = None
        self.losses.append(float(outputs['loss']))
        self.diverged |= not torch.isfinite(torch.tensor(self.losses[-1])).item()
        step = runner.iter + 1
        if step * loop.CURVE_POINTS % self.steps < loop.CURVE_POINTS or step == self.steps:
            self.curve['step'].append(step)
            self.curve['loss'].append(sum(self.losses) / len(self.losses))
            self.losses = []


def config(run: dict) -> Config:
    """The config of a run; the task's ``arguments`` are ``root`` and ``val_images``."""
    cfg = load_config(str(CONFIG))
    # The config's EstimatesHook makes the rate of an image that of a step.
    norm, conv = loop.norm_config(run['norm'], 1), run['conv']
    model, heads = cfg.model, cfg.model.roi_head
    for part in (model.backbone, model.neck, heads.bbox_head, heads.mask_head):
        part.norm_cfg, part.conv_cfg = copy.deepcopy(norm), copy.deepcopy(conv)
    arguments = run['arguments']
    if run['dataset'] == 'nuclei':
        root = Path(arguments['root'])
        if not root.is_dir():
            raise FileNotFoundError(f'the nuclei (train.json, val.json, images/) belong at {root}')
        _use_nuclei(cfg, root, arguments['val_images'], arguments['crop'])
    else:
        cfg.train_dataloader.dataset.data_root = arguments['root']
        cfg.val_dataloader.dataset.data_root = arguments['root']
        cfg.val_evaluator.ann_file = f'{arguments["root"]}annotations/instances_val2017.json'
    count = run['images_per_step']
    cfg.train_dataloader.batch_size = count
    steps = arguments['images'] // count
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=steps)
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=True, seed=run['seed'])
    # AdamW as in the config: with SGD this many steps detect nothing at all.
    cfg.optim_wrapper.optimizer.update(lr=run['lr'] * count, weight_decay=run['weight_decay'])
    warm_up = max(1, int(loop.WARM_UP * steps))
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=warm_up, end=steps, eta_min=0),
    ]
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=10**6, save_last=False)
    cfg.default_hooks.logger = dict(type='LoggerHook', interval=10**6)
    cfg.default_hooks.visualization = dict(type='DetVisualizationHook', draw=False)
    cfg.vis_backends, cfg.visualizer = [], dict(type='DetLocalVisualizer', vis_backends=[])
    cfg.test_dataloader = cfg.test_cfg = cfg.test_evaluator = None
    cfg.log_processor = dict(by_epoch=False)
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=run['seed'])
    cfg.experiment_name = f'study_{time.time_ns()}'
    return cfg


def _use_nuclei(cfg: Config, root: Path, val_images: int, crop: int) -> None:
    classes = dict(classes=('nucleus',))
    for part in (cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        part.num_classes = 1
    cfg.model.rpn_head.anchor_generator.scales = [3]  # most nuclei measure 10 to 40 pixels
    train, val = cfg.train_dataloader.dataset, cfg.val_dataloader.dataset
    load, annotate, *_ = train.pipeline
    for dataset, split in ((train, 'train'), (val, 'val')):
        dataset.update(
            type='CocoDataset', data_root=str(root), ann_file=f'{split}.json',
            data_prefix=dict(img='images/'), metainfo=classes,
        )  # fmt: skip
    train.pipeline = [
        load, annotate,
        dict(type='RandomCrop', crop_size=(crop, crop), allow_negative_crop=True),
        dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
        dict(type='PackDetInputs'),
    ]  # fmt: skip
    val.pipeline[1].update(scale=(256, 256))  # changes nothing, but notes the scale
    # Images of one size only, which keeps evaluation short; the metric reads its own file.
    content = json.loads((root / 'val.json').read_text())
    images = [i for i in content['images'] if i['height'] == i['width'] == 256][:val_images]
    ids = {image['id'] for image in images}
    content['images'] = images
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] in ids]
    with tempfile.NamedTemporaryFile('w', suffix='.json', delete=False) as file:
        json.dump(content, file)
    val.ann_file = cfg.val_evaluator.ann_file = file.name


def run(run: dict, report: Callable[[str], None] = lambda text: None) -> dict:
    """Trains and evaluates once; the record is that of `experiments.loop.run`."""
    cfg = config(run)
    started, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = Runner.from_cfg(cfg)
        recorder = Recorder(cfg.train_cfg['max_iters'])
        runner.register_hook(recorder)
        runner.train()
    if run['dataset'] == 'nuclei':
        Path(cfg.val_evaluator.ann_file).unlink()
    scalars = runner.message_hub.log_scalars
    # A model that detects nothing at all gets no entry from CocoMetric.
    metrics = {
        name: scalars[f'val/coco/{name}_mAP'].current()
        if f'val/coco/{name}_mAP' in scalars else 0.0
        for name in ('bbox', 'segm')
    }  # fmt: skip
    # One evaluation split: it chooses the learning rate and is reported, for every row alike.
    metrics = dict(val=metrics['segm'], test=metrics['segm'], bbox=metrics['bbox'])
    record = dict(
        run, metric='segm mAP', steps=recorder.steps, diverged=recorder.diverged,
        curve=recorder.curve, singularities=recorder.watched,
        metrics={} if recorder.diverged else metrics,
        **loop.circumstances(runner.model, started, cpu),
    )  # fmt: skip
    report(f'{record["metrics"]} in {record["cpu_seconds"]:.1f} s')
    return loop.plain(record)
