"""Instance segmentation: the small Mask R-CNN of configs/quick, run by mmengine's Runner."""

import contextlib
import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from experiments import loop
from wsbcn_mm.diagnostics import ActivationObserver, singularities
from wsbcn_mm.openmmlab.config import load_config
from wsbcn_mm.shapes import draw_dataset

CONFIG = Path(__file__).parents[3] / 'configs/quick/quick_mask-rcnn_r18_fpn_ws-bcn_1xb1_shapes.py'
DATASETS = ('nuclei', 'shapes_instances')
CALIBRATION_IMAGES = 100
LOSS_IMAGES = 60


class Recorder(Hook):
    """Keeps the training losses (their sum and each of them) and the singularity measures."""

    priority = 'LOW'

    def __init__(self, steps: int) -> None:
        self.steps, self.diverged = steps, False
        self.losses: dict[str, list[float]] = {}
        self.curve: dict[str, list[float]] = {'step': [], 'loss': []}
        self.watched: dict[str, list[float]] = {'step': []}
        self._observer: ActivationObserver | None = None

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
        for name in outputs:
            if name.startswith('loss'):
                self.losses.setdefault(name, []).append(outputs[name].item())
        self.diverged |= not math.isfinite(self.losses['loss'][-1])
        step = runner.iter + 1
        if step * loop.CURVE_POINTS % self.steps < loop.CURVE_POINTS or step == self.steps:
            self.curve['step'].append(step)
            for name, values in self.losses.items():
                self.curve.setdefault(name, []).append(sum(values) / len(values))
            self.losses = {}


def config(run: dict, folder: str | Path, weights: dict[str, Tensor] | None = None) -> Config:
    """The config of a run.

    The task's ``arguments``: ``root``, ``images`` (seen in training), ``val_images`` (choose the
    learning rate), ``test_images`` (reported), for nuclei ``crop``; ``options`` of the config where
    another network is wanted. A row may have ``options``, too, which come last.

    Args:
        run: See `experiments.grid.spec`.
        folder: For annotations of parts of a split.
        weights: State dict with which the backbone begins.

    Raises:
        FileNotFoundError: the data are not there.
    """
    cfg = load_config(str(CONFIG))
    # The config's EstimatesHook makes the rate of an image that of a step.
    rest = run.get('head', run)
    roi_norm = run.get('roi_norm', rest['norm'])
    model, heads = cfg.model, cfg.model.roi_head
    norms = (
        (model.backbone, run['norm'], run['conv']),
        (model.neck, rest['norm'], rest['conv']),
        (heads.bbox_head, roi_norm, rest['conv']),
        (heads.mask_head, roi_norm, rest['conv']),
    )
    for part, norm, conv in norms:
        part.norm_cfg, part.conv_cfg = loop.norm_config(norm, 1), copy.deepcopy(conv)
    if run.get('frozen'):
        model.backbone.norm_eval = True
        model.backbone.norm_cfg.requires_grad = False
    if weights is not None:
        path = Path(folder) / 'backbone.pth'
        torch.save({f'backbone.{name}': value for name, value in weights.items()}, path)
        cfg.load_from = str(path)
    arguments, count = run['arguments'], run['images_per_step']
    for options in (arguments, run):
        cfg.merge_from_dict(copy.deepcopy(options.get('options', {})))
    use = _use_nuclei if run['dataset'] == 'nuclei' else _use_shapes
    use(cfg, Path(arguments['root']), arguments, Path(folder))
    cfg.train_dataloader.batch_size = count
    steps = arguments['images'] // count
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_begin=steps + 1)
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
    cfg.log_processor = dict(by_epoch=False)
    cfg.log_level = 'ERROR'
    cfg.randomness = dict(seed=run['seed'])
    cfg.experiment_name = f'study_{time.time_ns()}'
    cfg.work_dir = str(folder)
    return cfg


def _read(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f'no annotations at {path}')
    return json.loads(path.read_text())


def _use_part(cfg: Config, split: str, content: dict, images: list[dict], folder: Path) -> None:
    """Makes ``split`` ('train', 'val', 'test') of these images; metrics read the same file."""
    ids = {image['id'] for image in images}
    annotations = [a for a in content['annotations'] if a['image_id'] in ids]
    path = folder / f'{split}.json'
    path.write_text(json.dumps(dict(content, images=images, annotations=annotations)))
    cfg[f'{split}_dataloader'].dataset.ann_file = str(path)
    if split != 'train':
        cfg[f'{split}_evaluator'].ann_file = str(path)


def _use_shapes(cfg: Config, root: Path, arguments: dict, folder: Path) -> None:
    draw_dataset(root.parent)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.data_root = f'{root}/'
    content = _read(root / 'annotations/instances_val2017.json')
    first = arguments['val_images']
    _use_part(cfg, 'val', content, content['images'][:first], folder)
    rest = content['images'][first:][: arguments['test_images']]
    _use_part(cfg, 'test', content, rest, folder)


def _use_nuclei(cfg: Config, root: Path, arguments: dict, folder: Path) -> None:
    if not root.is_dir():
        raise FileNotFoundError(f'the nuclei (train.json, val.json, images/) belong at {root}')
    for part in (cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        part.num_classes = 1
    cfg.model.rpn_head.anchor_generator.scales = [3]  # most nuclei measure 10 to 40 pixels
    load, annotate, *_ = cfg.train_dataloader.dataset.pipeline
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.update(
            type='CocoDataset',
            data_root=str(root),
            data_prefix=dict(img='images/'),
            metainfo=dict(classes=('nucleus',)),
        )
    size = (arguments['crop'], arguments['crop'])
    cfg.train_dataloader.dataset.pipeline = [
        load,
        annotate,
        dict(type='RandomCrop', crop_size=size, allow_negative_crop=True),
        dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
        dict(type='PackDetInputs'),
    ]
    for split in ('val', 'test'):  # changes nothing, but notes the scale
        cfg[f'{split}_dataloader'].dataset.pipeline[1].update(scale=(256, 256))
    # The rate is chosen on images held out of the training; images of one size keep it short.
    train, test = _read(root / 'train.json'), _read(root / 'val.json')
    held_out = _squares(train)[: arguments['val_images']]
    _use_part(cfg, 'val', train, held_out, folder)
    _use_part(cfg, 'train', train, [i for i in train['images'] if i not in held_out], folder)
    _use_part(cfg, 'test', test, _squares(test)[: arguments['test_images']], folder)


def _squares(content: dict) -> list[dict]:
    return [image for image in content['images'] if image['height'] == image['width'] == 256]


def run(
    run: dict,
    report: Callable[[str], None] = lambda _: None,
    weights: dict[str, Tensor] | None = None,
) -> dict:
    """Trains and evaluates once; the record is that of `experiments.loop.run`."""
    started, cpu = time.time(), time.process_time()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        cfg = config(run, folder, weights)
        runner = Runner.from_cfg(cfg)
        recorder = Recorder(cfg.train_cfg['max_iters'])
        runner.register_hook(recorder)
        runner.train()
        trained = copy.deepcopy(runner.model)  # an evaluation averages statistics anew
        metrics = {} if recorder.diverged else evaluate(runner, run['images_per_step'])
        losses = {} if recorder.diverged else trained_losses(runner, trained)
    record = dict(
        run,
        metric='segm mAP',
        steps=recorder.steps,
        diverged=recorder.diverged,
        curve=recorder.curve,
        singularities=recorder.watched,
        metrics=metrics,
        losses=losses,
        **loop.circumstances(runner.model, started, cpu),
    )
    report(f'{record["metrics"]} in {record["cpu_seconds"]:.1f} s')
    result: Any = loop.plain(record)
    return result


@torch.no_grad()
def trained_losses(runner: Runner, model: Any) -> dict[str, dict[str, float]]:
    """Losses of the trained model in evaluation mode, over the same images for every row.

    Over training crops (``crops``) and over the whole images that choose the rate (``images``).
    """
    model.eval()
    found: dict[str, dict[str, float]] = {}
    loaders = dict(crops=runner.train_dataloader, images=runner.val_dataloader)
    for name, loader in loaders.items():
        torch.manual_seed(0)  # which anchors and RoIs are sampled
        np.random.seed(0)  # where crops lie
        dataset = loader.dataset
        count = min(LOSS_IMAGES, len(dataset))
        sums: dict[str, list[float]] = {}
        for index in range(0, len(dataset), len(dataset) // count):
            batch = pseudo_collate([dataset[index]])
            parts = model(**model.data_preprocessor(batch, False), mode='loss')
            for part, value in model.parse_losses(parts)[1].items():
                sums.setdefault(part, []).append(value.item())
        found[name] = {part: sum(v) / len(v) for part, v in sums.items() if part != 'acc'}
    return found


def evaluate(runner: Runner, images_per_step: int) -> dict[str, float]:
    """The metrics, and once more with running statistics averaged anew over training images."""
    found, tested = runner.val(), runner.test()
    metrics = dict(val=_map(found, 'segm'), test=_map(tested, 'segm'), bbox=_map(tested, 'bbox'))
    batches = cycle(runner.train_dataloader)
    model = runner.model

    def forward() -> None:
        model(**model.data_preprocessor(next(batches), True), mode='loss')

    if loop.average_statistics(model, forward, CALIBRATION_IMAGES // images_per_step):
        metrics['test_recalibrated'] = _map(runner.test(), 'segm')
    return metrics


def _map(metrics: dict, kind: str) -> float:
    # A model that detects nothing at all gets no entry from CocoMetric.
    return float(metrics.get(f'coco/{kind}_mAP', 0.0))
