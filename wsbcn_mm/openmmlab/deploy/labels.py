"""What classifiers of images and of videos find: files of the best classes, labelled pictures."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SCOPES = ('mmpretrain', 'mmaction')
HEIGHT = 160  # of a frame in a picture, at least
FRAMES = 8  # in a picture, at most
LINE = 18  # height of a line of text


def scores_of(sample: Any) -> Tensor:
    """The score of each class, (C,): the mean over clips where the config has left them apart."""
    scores: Tensor = sample.pred_score
    return scores if scores.ndim == 1 else scores.softmax(-1).mean(0)


def best(sample: Any, classes: list[str] | None, count: int) -> list[dict[str, Any]]:
    """The classes with the highest scores, best first: label, class (its name) and score."""
    scores, labels = scores_of(sample).topk(min(count, len(scores_of(sample))))
    return [
        {'label': label, 'class': _name(label, classes), 'score': score}
        for label, score in zip(labels.tolist(), scores.tolist())
    ]


def _name(label: int, classes: list[str] | None) -> str:
    if classes is None:
        return str(label)
    if label >= len(classes):
        raise ValueError(
            f'the model predicts class number {label}, and {len(classes)} names of classes are '
            'known\n  name all of them: --cfg-options '
            'test_dataloader.dataset.metainfo.classes=...'
        )
    return classes[label]


class LabelWriter:
    """Predictions as JSON (a list for each file) and CSV (a row for each class of a file).

    The files appear when all is there.

    Args:
        folder: Gets ``predictions.json`` and ``predictions.csv``.
        classes: Names in the order of the labels; None: the numbers are the names.
        count: How many classes of each file.
    """

    def __init__(self, folder: Path, classes: list[str] | None, count: int) -> None:
        self.classes, self.count = classes, count
        self._folder = folder
        self._found: list[dict[str, Any]] = []

    def add(self, name: str, sample: Any, size: object = None) -> None:
        """The prediction for one file."""
        self._found.append(dict(file=name, top=best(sample, self.classes, self.count)))

    def close(self, complete: bool = True) -> None:
        """Writes the files, where the run was completed."""
        if not complete:
            return
        part = self._folder / '.predictions.part'
        part.write_text(json.dumps(dict(classes=self.classes, predictions=self._found)) + '\n')
        os.replace(part, self._folder / 'predictions.json')
        with part.open('w', newline='') as file:
            rows = csv.writer(file)
            rows.writerow(['file', 'rank', 'label', 'class', 'score'])
            for found in self._found:
                for rank, entry in enumerate(found['top'], 1):
                    score = f'{entry["score"]:.6f}'
                    rows.writerow([found['file'], rank, entry['label'], entry['class'], score])
        os.replace(part, self._folder / 'predictions.csv')


def draw(frames: np.ndarray, lines: list[str], path: Path) -> None:
    """A picture of an image, or of frames beside one another, with lines of text below.

    Args:
        frames: uint8 RGB, (T, H, W, 3); of more than eight, eight are shown.
        lines: The text.
        path: The file.
    """
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), FRAMES)).round().astype(int)
    strip = Image.fromarray(np.concatenate([frames[i] for i in chosen], axis=1))
    factor = max(1, -(-HEIGHT // strip.height))
    if len(chosen) > 1:
        factor = min(factor, 2)
    strip = strip.resize((strip.width * factor, strip.height * factor), Image.Resampling.NEAREST)
    font = ImageFont.load_default(LINE - 4)
    width = max(strip.width, *(int(font.getlength(line)) + 12 for line in lines))
    picture = Image.new('RGB', (width, strip.height + LINE * len(lines) + 6))
    picture.paste(strip, (0, 0))
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        pen.text((6, strip.height + 2 + LINE * i), line, fill=(255, 255, 255), font=font)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
