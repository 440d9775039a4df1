"""What the numbers of a diagnosis say: a sentence for each, and what to do.

First of all whether the model has learned anything: a network that has not can have all its
channels alive, its estimates in place and its gradients small.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm.openmmlab.data.samples import IGNORED

SCORE, OVERLAP = 0.3, 0.5  # a detection counts from this score on, a box as found from this IoU on


@dataclass(frozen=True)
class Verdict:
    """One sentence about a model.

    Attributes:
        level: ``'bad'``, ``'doubtful'`` or ``'good'``.
        measure: The number of the summary that it is about.
        text: What it says.
        advice: What to do; empty where nothing is needed.
    """

    level: str
    measure: str
    text: str
    advice: str = ''

    def __str__(self) -> str:
        advice = f'\n    try: {self.advice}' if self.advice else ''
        return f'{self.level}: {self.text}{advice}'


FIND_LR = 'tools/analysis_tools/find_lr.py CONFIG measures the rate on your data'
# Measure -> (bad from, doubtful from, what is said, what to do); a measure below both is good.
LIMITS: dict[str, tuple[float, float, str, str]] = {
    'dead_channels': (
        0.3,
        0.1,
        '{0:.0%} of the channels are off for every input',
        'a lower rate, or WS + BCN where the norm is GN or LN',
    ),
    'drift_share': (
        0.3,
        0.1,
        'the running estimates of {0:.0%} of the channels are far from the data',
        'tools/model_converters/recalibrate.py; a larger momentum in short trainings; '
        'norm_eval=False',
    ),
    'gradient_ratio': (
        1.01,
        1.001,
        'weight gradients are {0:.3g} times the bound that WS sets',
        'a defect: WS keeps them at or below it',
    ),
}
# Skill and fall of the loss: (bad below, doubtful below).
LEARNED, FALLEN = (0.02, 0.2), (0.05, 0.2)


def verdict(summary: dict[str, float | None]) -> list[Verdict]:
    """Sentences about a summary of `wsbcn_mm.openmmlab.measure.diagnosis.diagnose`, worst first.

    A network that has learned nothing is bad, whatever its other measures are, and these are then
    left out: they describe a network as it was drawn.
    """
    found = [_learned(summary.get('skill')), _fallen(summary.get('loss_fallen'))]
    first = [finding for finding in found if finding is not None]
    if not any(finding.level == 'bad' for finding in first):
        first += _limits(summary)
    order = ('bad', 'doubtful', 'good')
    return sorted(first, key=lambda finding: order.index(finding.level))


def _level(value: float, limits: tuple[float, float]) -> str:
    return 'bad' if value < limits[0] else 'doubtful' if value < limits[1] else 'good'


def _learned(skill: float | None) -> Verdict | None:
    if skill is None:
        return None
    level = _level(skill, LEARNED)
    if level == 'bad':
        text = 'the model knows nothing of the images: everything is background, or the commonest '
        text += f'class (skill {skill:.2f})'
        advice = (
            f'the rate is too low, or masks and classes are not what the config says; {FIND_LR}'
        )
        return Verdict(level, 'skill', text, advice)
    text = f'of what the commonest answer leaves open, {skill:.0%} is right'
    advice = '' if level == 'good' else f'train longer, or at a higher rate; {FIND_LR}'
    return Verdict(level, 'skill', text, advice)


def _fallen(share: float | None) -> Verdict | None:
    if share is None:
        return None
    level = _level(share, FALLEN)
    if level == 'bad':
        text = f'your loss did not move: it fell by {max(share, 0):.0%} during the training'
        return Verdict(level, 'loss_fallen', text, f'rate too low, or too high; {FIND_LR}')
    text = f'the loss fell by {share:.0%} during the training'
    return Verdict(level, 'loss_fallen', text, '' if level == 'good' else FIND_LR)


def _limits(summary: dict[str, float | None]) -> Iterable[Verdict]:
    for measure, (bad, doubtful, text, advice) in LIMITS.items():
        value = summary.get(measure)
        if value is not None:
            level = 'bad' if value >= bad else 'doubtful' if value >= doubtful else 'good'
            told = '' if level == 'good' else advice
            yield Verdict(level, measure, text.format(value), told)


def loss_fallen(checkpoint: dict[str, Any]) -> float | None:
    """The share by which the loss fell in the training that made a checkpoint.

    Means over the first and the last tenth of the losses that mmengine's message hub keeps in it;
    None where there are none, or fewer than twenty.
    """
    scalars = (checkpoint.get('message_hub') or {}).get('log_scalars') or {}
    buffer = scalars.get('train/loss')
    if buffer is None:
        return None
    losses, _ = buffer.data
    part = len(losses) // 10
    if part < 2:
        return None
    return float(1 - losses[-part:].mean() / losses[:part].mean())


class Skill:
    """How much of what the commonest answer leaves open a model gets right.

    Segmentation: (share of pixels right - share of the commonest class) / (1 - that share), not
    below 0. Detection: the share of boxes that a detection of the same class finds. Other results
    are not judged.
    """

    def __init__(self) -> None:
        self.right = self.total = 0.0
        self.classes: Tensor | None = None  # pixels of each class

    def add(self, results: Any) -> None:
        """Counts what a validation step returned."""
        for result in results if isinstance(results, (list, tuple)) else [results]:
            if isinstance(result, Tensor):
                continue
            if 'pred_sem_seg' in result and 'gt_sem_seg' in result:
                self._pixels(result.pred_sem_seg.data, result.gt_sem_seg.data)
            elif 'pred_instances' in result and 'bboxes' in result.get('gt_instances', ()):
                self._boxes(result.pred_instances, result.gt_instances)

    def value(self) -> float | None:
        """The share; None where nothing was counted."""
        if not self.total:
            return None
        common = 0.0 if self.classes is None else float(self.classes.max()) / self.total
        share = self.right / self.total
        return 1.0 if common == 1 and share == 1 else max(0.0, (share - common) / (1 - common))

    def _pixels(self, predicted: Tensor, truth: Tensor) -> None:
        truth = truth.to(predicted.device)
        counted = truth != IGNORED
        self.right += float((predicted == truth)[counted].sum())
        self.total += float(counted.sum())
        found = torch.bincount(truth[counted].long().flatten(), minlength=IGNORED).double().cpu()
        self.classes = found if self.classes is None else self.classes + found

    def _boxes(self, predicted: Any, truth: Any) -> None:
        boxes = _corners(truth.bboxes)
        self.total += len(boxes)
        kept = predicted.scores >= SCORE
        found = _corners(predicted.bboxes)[kept].to(boxes)
        if len(boxes) and len(found):
            labels = predicted.labels[kept].to(truth.labels)
            same = truth.labels[:, None] == labels[None]
            self.right += float(((_overlaps(boxes, found) >= OVERLAP) & same).any(1).sum())


def _corners(boxes: Any) -> Tensor:
    corners: Tensor = getattr(boxes, 'tensor', boxes)
    return corners


def _overlaps(a: Tensor, b: Tensor) -> Tensor:
    """(N, 4) and (M, 4) corners to the (N, M) intersections over unions."""
    sides = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = (sides - torch.maximum(a[:, None, :2], b[None, :, :2])).clamp(min=0)
    inside = sides.prod(-1)
    areas = [(x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b)]
    return inside / (areas[0][:, None] + areas[1][None] - inside).clamp(min=1e-9)
