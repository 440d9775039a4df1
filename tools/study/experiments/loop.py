"""Trains one cell of the grid and says everything about it in one record."""

import functools
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.tasks import Task
from wsbcn_mm import BatchChannelNorm2d, __version__
from wsbcn_mm.diagnostics import ActivationObserver, singularities

CURVE_POINTS = 24
WARM_UP = 0.1  # share of the training
CALIBRATION_IMAGES = 200


def run(
    task: Task,
    spec: dict,
    report: Callable[[str], None] = lambda _: None,
    before_step: Callable[[int, nn.Module, Callable[[], Tensor]], None] | None = None,
    weights: dict[str, Tensor] | None = None,
    after: Callable[[nn.Module], None] | None = None,
    device: str = 'cpu',
) -> dict:
    """Trains and evaluates once.

    Args:
        task: What is learned.
        spec: ``norm``, ``conv`` (mmcv configs), ``images_per_step``, ``lr`` (per image of a step:
            the linear rule), ``seed``, ``epochs``, ``weight_decay``; ``head`` (norm and conv),
            ``frozen`` (the backbone's BatchNorms), ``accumulate`` (so many micro-steps of
            ``images_per_step`` make an optimizer's step) where a row has them.
        report: Shows progress.
        before_step: Called with the number of the step, the model and what computes the loss of
            its batch.
        weights: State dict with which the backbone begins.
        after: Called with the trained model.
        device: Where the model trains.

    Returns:
        The record: spec, curves, metrics; numbers and texts only. Metrics of a run whose loss
        became infinite or not a number are None.
    """
    count = spec['images_per_step']
    model = build(task, spec, weights).to(device)
    accumulate = spec.get('accumulate', 1)
    lr = spec['lr'] * count * accumulate
    learned = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in learned if p.dim() > 1]
    rest = [p for p in learned if p.dim() <= 1]
    optimizer = torch.optim.SGD(
        [dict(params=decayed, weight_decay=spec['weight_decay']), dict(params=rest)],
        lr,
        momentum=0.9,
        fused=True,
    )
    # Whole steps of 8: every column sees the same images, the same number of times.
    per_epoch = task.num_train // 8 * 8
    steps = spec['epochs'] * per_epoch // count
    curve: dict[str, list[float]] = {'step': [], 'loss': []}
    watched: dict[str, list[float]] = {'step': []}
    started, cpu, losses, step, diverged = time.time(), time.process_time(), [], 0, False
    for epoch in range(spec['epochs']):
        order = np.random.default_rng([spec['seed'], epoch]).permutation(task.num_train)[:per_epoch]
        rng = np.random.default_rng([spec['seed'], epoch, 1])
        for start in range(0, per_epoch, count):
            batch = task.train_batch(order[start : start + count].tolist(), rng)
            images, targets = (part.to(device) for part in batch)
            if step % accumulate == 0:
                optimizer.zero_grad()
                for group in optimizer.param_groups:
                    group['lr'] = lr * rate_factor(step / steps)
            if before_step is not None:
                before_step(step, model, functools.partial(task.loss, model, images, targets))
            watch = step % max(1, steps // 12) == 0 or step == steps - 1
            if watch:
                with ActivationObserver(model) as observer:
                    loss = task.loss(model, images, targets)
                watched['step'].append(step)
                for name, value in singularities(observer.layers()).items():
                    watched.setdefault(name, []).append(value)
            else:
                loss = task.loss(model, images, targets)
            (loss / accumulate).backward()
            if (step + 1) % accumulate == 0:
                optimizer.step()
            losses.append(loss.item())
            step += 1
            if step * CURVE_POINTS % steps < CURVE_POINTS or step == steps:
                curve['step'].append(step)
                curve['loss'].append(float(np.mean(losses)))
                losses = []
            diverged = not math.isfinite(loss.item())
            if diverged:
                break
        if diverged:
            break
    if after is not None:
        after(model)
    record = dict(
        spec,
        metric=task.metric,
        steps=steps,
        diverged=diverged,
        curve=curve,
        singularities=watched,
        metrics={} if diverged else evaluate(task, model, spec),
        **circumstances(model, started, cpu),
    )
    report(f'{record["metrics"]} in {record["cpu_seconds"]:.1f} s')
    result: Any = plain(record)
    return result


def build(task: Task, spec: dict, weights: dict[str, Tensor] | None) -> nn.Module:
    """The model of a run, in training mode: see `run`."""
    torch.manual_seed(spec['seed'])
    count, head = spec['images_per_step'], spec.get('head')
    if head is not None:
        head = dict(head, norm=norm_config(head['norm'], count))
    model = task.build(norm_config(spec['norm'], count), spec['conv'], head)
    if weights is not None:
        model.get_submodule('backbone').load_state_dict(weights)
    if spec.get('frozen'):
        backbone: Any = model.get_submodule('backbone')  # OpenMMLab's
        backbone.norm_eval = True
        for layer in backbone.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.requires_grad_(False)
    return model.train()


def norm_config(norm: dict, images_per_step: int) -> dict:
    """The norm's config at this step size: ``momentum_per_image`` becomes ``momentum``."""
    norm = dict(norm)
    if 'momentum_per_image' in norm:
        norm['momentum'] = min(1.0, norm.pop('momentum_per_image') * images_per_step)
    return norm


def rate_factor(done: float) -> float:
    """Warm-up, then half a cosine; ``done`` in [0, 1)."""
    if done < WARM_UP:
        return 0.01 + 0.99 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def evaluate(task: Task, model: nn.Module, spec: dict) -> dict[str, float]:
    """The metrics, and once more with running statistics averaged anew over training images."""
    model.eval()
    metrics = {split: task.evaluate(model, split) for split in ('val', 'test')}
    if recalibrate(task, model, spec):
        model.eval()
        metrics['test_recalibrated'] = task.evaluate(model, 'test')
    return metrics


def recalibrate(task: Task, model: nn.Module, spec: dict) -> bool:
    """`average_statistics` over training images of the task."""
    rng = np.random.default_rng([spec['seed'], 2])
    count = spec['images_per_step']

    def forward() -> None:
        images, _ = task.train_batch(rng.integers(task.num_train, size=count).tolist(), rng)
        model(images.to(next(model.parameters()).device))

    return average_statistics(model, forward, CALIBRATION_IMAGES // count)


@torch.no_grad()
def average_statistics(model: nn.Module, forward: Callable[[], object], steps: int) -> bool:
    """Replaces running statistics by plain averages over training images, weights untouched.

    Args:
        model: Left in training mode.
        forward: Runs the model on the next images.
        steps: How often.

    Returns:
        Whether the model has any.
    """
    model.train()  # frozen layers stay in evaluation
    layers = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    if not layers:
        return False
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative
    # The estimate mode normalises with the average so far: its first images must not spoil it.
    rounds = 2 if any(isinstance(m, BatchChannelNorm2d) for m in model.modules()) else 1
    for _ in range(rounds):
        for layer in layers:
            assert layer.num_batches_tracked is not None
            layer.num_batches_tracked.zero_()
        for _ in range(max(1, steps)):
            forward()
    return True


def circumstances(model: nn.Module, started: float, cpu: float) -> dict:
    """Where and how a run was made; ``started`` and ``cpu`` are time and CPU time at its start."""
    return dict(
        parameters=sum(p.numel() for p in model.parameters()),
        cpu_seconds=time.process_time() - cpu,
        wall_seconds=time.time() - started,
        versions=dict(
            wsbcn_mm=__version__, torch=torch.__version__, python=platform.python_version()
        ),
        threads=torch.get_num_threads(),
        machine=_machine(next(model.parameters()).device),
    )


def _machine(device: torch.device) -> str:
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
        return next(line.split(':')[1].strip() for line in lines if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor()


def plain(value: object) -> object:
    """Numbers with five digits; not-a-number, which JSON lacks, as None."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, float):
        return float(f'{value:.5g}') if math.isfinite(value) else None
    return value
