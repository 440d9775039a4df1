"""What reaches the model in training: images that lost all their objects, boxes that are none.

Nothing raises in the hosts where a step of the pipeline takes out every object: the network learns
that there is nothing. A box without a size makes the loss NaN, and an image among thousands did it.
"""

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.structures import BaseDataElement
from torch import Tensor

from wsbcn_mm.openmmlab.data.reading import DataError, warn
from wsbcn_mm.openmmlab.data.samples import IGNORED

IMAGES = 32  # that come with nothing on them, the first of a training, before anything is said
REPLAYED = 4  # of them that go through the pipeline once more, step by step


class Arriving:
    """Looks at the batches of a training, at their contents until the first that has any.

    Args:
        datasets: Those that are trained on, below the wrappers.
    """

    def __init__(self, datasets: list[Any]) -> None:
        self._datasets = [d for d in datasets if hasattr(d, 'get_data_info')]
        self._has_content = not self._datasets
        self._empty: list[str] = []  # images
        self._text = ''
        self._odd = ''

    def before(self, batch: Any) -> None:
        """A batch comes: warns where the first images have lost their objects.

        Raises:
            DataError: a box has coordinates that are NaN or infinite.
        """
        samples = list(_samples_in(batch.get('data_samples') if isinstance(batch, dict) else None))
        odd = [found for sample in samples if (found := _odd_box(sample))]
        self._odd = odd[0][0] if odd else ''
        for text, is_finite in odd:
            if not is_finite:
                raise DataError(text)
        if self._has_content or len(self._empty) >= IMAGES:
            self._has_content = self._has_content or any(map(_content, samples))
            return
        for sample in samples:
            content = _content(sample)
            self._has_content = self._has_content or bool(content)
            if content is False:
                self._empty.append(str(sample.metainfo.get('img_path')))
        if not self._has_content and len(self._empty) >= IMAGES:
            self._text = _lost(self._datasets, self._empty[:IMAGES])
            if self._text:
                warn(self._text)

    def after(self, outputs: Any) -> None:
        """The batch was learned.

        Raises:
            DataError: the loss is not finite, and neither is a box of the batch, or it has no size.
        """
        if self._odd and isinstance(outputs, dict):
            loss = outputs.get('loss')
            if isinstance(loss, Tensor) and not loss.isfinite().all():
                raise DataError(f'the loss is {loss.mean().item()}, and {self._odd}')

    def end(self) -> None:
        """The training ends.

        Raises:
            DataError: no image brought an object, and the files have some.
        """
        if self._text and not self._has_content:
            raise DataError(f'nothing was learned in the whole training: {self._text}')


def _samples_in(value: Any) -> Iterator[Any]:
    """Below lists, branches (semi-supervised training) and videos."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _samples_in(part)
    elif isinstance(value, BaseDataElement):
        frames = value.get('video_data_samples')
        yield from _samples_in(frames) if frames is not None else (value,)


def _content(sample: Any) -> bool | None:
    """Whether there is something to learn on it; None: something else than objects or masks."""
    objects, mask = sample.get('gt_instances'), sample.get('gt_sem_seg')
    labels = getattr(mask, 'sem_seg', getattr(mask, 'data', None))
    if objects is None and not isinstance(labels, Tensor):
        return None
    marked = isinstance(labels, Tensor) and bool((labels != IGNORED).any())
    return marked or bool(objects is not None and len(objects))


def _odd_box(sample: Any) -> tuple[str, bool] | None:
    """What is wrong with a box of an image, and whether it is finite."""
    boxes = getattr(sample.get('gt_instances'), 'bboxes', None)
    boxes = getattr(boxes, 'tensor', boxes)
    if not isinstance(boxes, Tensor) or boxes.ndim != 2 or not len(boxes):
        return None
    # Of every image of every step: few operations where all is well.
    if boxes.shape[1] == 4 and boxes.is_floating_point():
        least, most = torch.aminmax(boxes[:, 2:] - boxes[:, :2])
        if least > 0 and most < math.inf:  # neither if a coordinate is not finite
            return None
    wrong = ~boxes.isfinite().all(1)
    if boxes.shape[1] == 4:
        wrong |= (boxes[:, 2:] <= boxes[:, :2]).any(1)
    if not wrong.any():
        return None
    shown = ', '.join(f'{x:g}' for x in boxes[wrong][0].tolist())
    text = (
        f'{sample.metainfo.get("img_path")} has the box [{shown}] when it reaches the model, which '
        'is none (x1, y1, x2, y2)\n  correct its annotations, or take the object out'
    )
    return text, bool(boxes.isfinite().all())


# ---- where objects are lost ----------------------------------------------------------------------


def _lost(datasets: list[Any], paths: list[str]) -> str:
    """That images lost their objects, and at which step; nothing: they have none."""
    wanted, steps, having = set(paths), Counter[str](), 0
    file = ''
    for dataset in datasets:
        for index in range(len(dataset)):
            info = dataset.get_data_info(index)
            for image in info.get('images', [info]):
                if image.get('img_path') not in wanted or not _is_annotated(image):
                    continue
                wanted.discard(image['img_path'])
                having, file = having + 1, str(getattr(dataset, 'ann_file', ''))
                if steps.total() < REPLAYED and image is info:
                    steps[_taken_by(dataset, info)] += 1
    count = len(set(paths))
    if having * 4 < count:
        return ''
    step = steps.most_common(1)[0][0] if steps else ''
    taken = f'{step} takes them out' if step else 'the pipeline takes them out'
    return (
        f'the first {count} images of the training came with nothing to learn, and {file} has '
        f'objects for {having} of them: {taken}\n  choose other limits, or leave it out'
    )


def _is_annotated(image: dict[str, Any]) -> bool:
    if 'instances' in image:
        return any(not o.get('ignore_flag') for o in image['instances'] or ())
    return bool(image.get('seg_map_path'))


def _taken_by(dataset: Any, info: dict[str, Any]) -> str:
    """The step of a data set's own pipeline behind which nothing is left of an image."""
    had = False
    with _chance_kept():
        for step in copy.deepcopy(getattr(dataset.pipeline, 'transforms', ())):
            info = step(info)
            if not isinstance(info, dict) or 'data_samples' in info:
                break
            left = _left(info)
            if had and not left:
                settings = ', '.join(f'{k}={v!r}' for k, v in vars(step).items() if k[0] != '_')
                return f'{type(step).__name__}({settings[:200]}) of its pipeline'
            had = left
    return ''


def _left(data: dict[str, Any]) -> bool:
    boxes, mask = data.get('gt_bboxes'), data.get('gt_seg_map')
    ignored = data.get('gt_ignore_flags')
    if boxes is not None and len(boxes):
        return ignored is None or not np.all(ignored)
    return isinstance(mask, np.ndarray) and bool((mask != IGNORED).any())


@contextmanager
def _chance_kept() -> Iterator[None]:
    """Random numbers go on afterwards as if none had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
