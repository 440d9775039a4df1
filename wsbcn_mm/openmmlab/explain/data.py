"""Says which file of the data an error of the hosts came from: annotations, a list, a sample.

They name a line of theirs (``Target 7 is out of bounds``); the traceback still holds what was read.
"""

import os
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.fileio import BaseStorageBackend
from mmengine.structures import BaseDataElement
from torch import nn

from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.data.annotations import comes_from_annotations, damaged_annotations
from wsbcn_mm.openmmlab.data.reading import DataError, is_left_behind, lacking
from wsbcn_mm.openmmlab.data.samples import (
    IGNORED,
    another_size,
    class_left_behind,
    label_beyond,
    labels_of,
)
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.explain.traces import Frame, frames_of
from wsbcn_mm.openmmlab.loaders import LOADERS, datasets_of

# How loops over the lines of a list call one, and what one that cannot be read raises.
NAMES, KINDS = ('line', 'sample', 'img_id'), (ValueError, IndexError, FileNotFoundError)
# What a pipeline ends in, and some of what its last step says of an image.
PACKED = ('inputs', 'data_samples')
META = {'img_path', 'img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'}
SPACES = 'spaces between, the label a number from 0'
# What a line of a list must be, by the name of the class that reads it or of a base of it.
LINES = {
    'CustomDataset': f'"FILE LABEL", {SPACES}',
    'VideoDataset': f'"FILE LABEL", {SPACES}, with another delimiter=... where names have spaces',
    'RawframeDataset': f'"FOLDER FRAMES LABEL", {SPACES}',
    'XMLDataset': 'the name of an image without its suffix',
}


def explain(cfg: Config, error: BaseException) -> str | None:
    """One sentence about the file that an error came from; None where that is not sure."""
    frames = frames_of(error)
    if comes_from_annotations(error):
        lines = damaged_annotations(cfg, *_loaders_in(frames, cfg))
        if lines:
            return '\n'.join(lines) + f'\n  it ended in {type(error).__name__}: {first_line(error)}'
    return (
        _of_storage(error)
        or _of_list(error, frames)
        or _of_folders(frames)
        or _of_empty(frames)
        or _of_mixed(error, frames)
        or _of_pipeline(error, frames)
        or _of_weights(error, frames)
        or _of_sample(error, frames)
    )


def _of_storage(error: BaseException) -> str | None:
    """A storage that reads files, and does not know folders."""
    storage = getattr(error, 'obj', None)
    if not isinstance(error, AttributeError) or not isinstance(storage, BaseStorageBackend):
        return None
    return (
        f'{type(storage).__name__} has no {error.name}, which the data set asks for: it reads '
        "single files\n  write whole addresses, data_root='', ann_file=..., data_prefix="
        'dict(img=...); or give backend_args to LoadImageFromFile alone, and have the annotations '
        'on the disk'
    )


def _loaders_in(frames: list[Frame], cfg: Config) -> list[str]:
    """The loaders whose annotation files functions have in hands; all where none does."""
    held = [f.names.get('annotation_file') for f in frames]
    held += [getattr(f.names.get('self'), 'ann_file', None) for f in frames]
    files = {os.path.normpath(file) for file in held if isinstance(file, str)}
    found = [
        loader
        for loader, dataset in datasets_of(cfg, *LOADERS)
        if os.path.normpath(
            os.path.join(dataset.get('data_root') or '', str(dataset.get('ann_file')))
        )
        in files
    ]
    return list(dict.fromkeys(found)) or list(LOADERS)


def _of_list(error: BaseException, frames: list[Frame]) -> str | None:
    """A line of a list of files that its data set stopped at."""
    for frame in reversed(frames):
        dataset = frame.names.get('self')
        if frame.code.co_name == 'load_data_list' and isinstance(dataset, BaseDataset):
            line = next((frame.names[n] for n in NAMES if n in frame.names), None)
            wanted = [LINES[k.__name__] for k in type(dataset).__mro__ if k.__name__ in LINES]
            inside = next((f.names['img_info'] for f in frames if 'xml_path' in _info(f)), None)
            if inside is not None and not isinstance(error, OSError):
                return (
                    f'{inside["xml_path"]} cannot be read\n  {type(error).__name__}: '
                    f'{first_line(error)}\n  an object needs a name and a bndbox with xmin, ymin, '
                    'xmax, ymax in pixels, the size width and height'
                )
            if line is None or not wanted or not isinstance(error, KINDS):
                return None
            shown = line if isinstance(line, str) else ' '.join(line)
            return (
                f'{type(dataset).__name__} cannot read the line {shown.strip()!r} of '
                f'{dataset.ann_file}\n  {type(error).__name__}: {first_line(error)}\n  every line '
                f'must be {wanted[0]}; no heading, no empty line'
            )
    return None


def _of_folders(frames: list[Frame]) -> str | None:
    """Folders of classes, of which an editor has made one."""
    dataset = frames[-1].names.get('self') if frames else None
    if frames and frames[-1].code.co_name == '_find_samples' and isinstance(dataset, BaseDataset):
        for folder in filter(is_left_behind, frames[-1].names.get('classes') or ()):
            path = os.path.join(str(getattr(dataset, 'img_prefix', '')), folder)
            return f'{type(dataset).__name__}: {class_left_behind(path)}'
    return None


def _info(frame: Frame) -> dict[str, Any]:
    info = frame.names.get('img_info')
    return info if isinstance(info, dict) else {}


def _of_empty(frames: list[Frame]) -> str | None:
    """A pipeline that gave up every image that was tried."""
    if not frames or frames[-1].code is not BaseDataset.__getitem__.__code__:
        return None
    dataset, index = frames[-1].names['self'], frames[-1].names['idx']
    data = dataset.get_data_info(index)
    for step in getattr(dataset.pipeline, 'transforms', ()) if frames[-1].raises else ():
        data = step(data)
        if data is None:
            return (
                f'{type(dataset).__name__} ({dataset.ann_file}): {type(step).__name__} of its '
                f'pipeline takes out every image that was tried\n  it has {_settings_of(step)}\n'
                '  nothing may be left of their objects: choose lower limits, or leave it out '
                '(keep_empty=True is what lets FilterAnnotations take images out)'
            )
    return None


def _of_mixed(error: BaseException, frames: list[Frame]) -> str | None:
    """Boxes of several images, and masks of the first."""
    results = next(
        (r for f in reversed(frames) if isinstance(r := f.names.get('results'), dict)), {}
    )
    boxes, masks = results.get('gt_bboxes'), results.get('gt_masks')
    if (
        not isinstance(error, IndexError)
        or boxes is None
        or masks is None
        or len(boxes) == len(masks)
    ):
        return None
    return (
        f'the pipeline gives {len(boxes)} boxes and {len(masks)} masks: a step that mixes images '
        '(Mosaic, MixUp) keeps the masks of one alone\n  CopyPaste keeps all; or load none: '
        'LoadAnnotations with with_mask=False'
    )


def _settings_of(step: Any) -> str:
    return ', '.join(f'{k}={v!r}' for k, v in vars(step).items() if k[0] != '_')[:200] or 'none'


def _of_pipeline(error: BaseException, frames: list[Frame]) -> str | None:
    """What a transform or a head looks for and the pipeline does not give."""
    step = frames[-1].names.get('self') if frames else None
    if step is not None and isinstance(error, KeyError) and '.transforms.' in frames[-1].module:
        return lacking(step, error)
    released = bool(frames) and frames[-1].is_released
    if isinstance(error, KeyError) and released and (text := _not_packed(error, frames[-1])):
        return text
    if isinstance(error, AttributeError) and isinstance(error.obj, BaseDataElement) and released:
        mend = (
            'load them: LoadAnnotations with with_mask=True, with_seg=True; a step that mixes '
            'images (Mosaic, MixUp) may drop them, and CopyPaste keeps masks'
        )
        if error.name == 'gt_label':
            mend = 'its annotations must have one: a list "FILE LABEL", or gt_label in a JSON file'
        text = f'the samples have no {error.name}, which the model learns\n  {first_line(error)}'
        return f'{text}\n  {mend}'
    return None


def _not_packed(error: KeyError, last: Frame) -> str | None:
    """What the last step of a pipeline gives: samples, with what ``meta_keys`` names."""
    key = error.args[0] if error.args else None
    for name, value in last.names.items():
        there = value.metainfo if _is_sample(value) else value
        if not isinstance(there, dict) or not there or key in there:
            continue
        given = f'the samples have no {key!r}\n  they have {", ".join(map(str, there))}\n  '
        if name == 'data' and key in PACKED:
            return (
                f'{given}the last step of a pipeline packs them: PackDetInputs (MMDetection), '
                'PackSegInputs (MMSegmentation), PackInputs (MMPretrain), PackActionInputs'
            )
        if META & {*there} and str(key).startswith('gt_'):
            return (
                f'{given}what is evaluated is compared with it: the data set must have it in its '
                'annotations, and load them; tools/infer.py needs none'
            )
        if META & {*there}:
            return (
                f'{given}name it in meta_keys of the last step of the pipeline (PackDetInputs and '
                f'its kind), or leave meta_keys out\n  it ended in {last.module}'
            )
    return None


def _of_weights(error: BaseException, frames: list[Frame]) -> str | None:
    """MMSegmentation's cross-entropy looks up the weight of a class for pixels of none, too."""
    # A comprehension is a function of its own.
    last = next((f for f in reversed(frames) if {'class_weight', 'label'} <= {*f.names}), None)
    names: dict[str, Any] = last.names if last else {}
    weights, label, ignored = map(names.get, ('class_weight', 'label', 'ignore_index'))
    if last is None or weights is None or not isinstance(label, torch.Tensor):
        return None
    if not isinstance(error, IndexError) or not len(weights) <= int(label.max()) == ignored:
        return None
    return (
        f'a loss with class_weight stops at masks that hold {ignored} ("ignore", and what pads an '
        f'image to the size): {last.code.co_name} looks up its weight, and has '
        f'{len(weights)}\n  set class_weight=None there, or train on crops without such pixels\n'
        f'  it ended in {type(error).__name__}: {first_line(error)}'
    )


def _of_sample(error: BaseException, frames: list[Frame]) -> str | None:
    """A sample of the batch in hands that is not of its image, or has labels of no class."""
    if not isinstance(error, (IndexError, RuntimeError, ValueError, AssertionError)):
        return None
    modules = [frame.names.get('self') for frame in frames]
    model = next((unwrapped(m) for m in modules if isinstance(m, nn.Module)), None)
    number = _num_classes(model)
    for sample in _samples_in(frames):
        try:
            text = _wrong_sample(sample, number)
        except DataError as wrong:
            text = str(wrong)
        if text:
            return f'{text}\n  it ended in {type(error).__name__}: {first_line(error)}'
    return None


def _num_classes(model: nn.Module | None) -> int | None:
    numbers = [
        module.num_classes
        for name, module in (model.named_modules() if model is not None else ())
        if 'head' in name and isinstance(getattr(module, 'num_classes', None), int)
    ]
    return max(numbers, default=None)


def _samples_in(frames: list[Frame]) -> list[Any]:
    """The data samples of the innermost function that has some."""
    for frame in reversed(frames):
        for value in frame.names.values():
            value = value.get('data_samples') if isinstance(value, dict) else value
            found = value if isinstance(value, (list, tuple)) else []
            if found and all(map(_is_sample, found)):
                return list(found)
    return []


def _is_sample(value: object) -> bool:
    return isinstance(value, BaseDataElement) and 'Sample' in type(value).__name__


def _wrong_sample(sample: Any, number: int | None) -> str | None:
    info = sample.metainfo
    path = str(info.get('seg_map_path') or info.get('img_path') or 'a sample')
    if 'gt_sem_seg' in sample and 'ori_shape' in info:
        mask = np.asarray(sample.gt_sem_seg.data.cpu()).squeeze(0)
        sizes = [tuple(info[k][:2]) for k in ('ori_shape', 'img_shape', 'pad_shape') if k in info]
        if mask.ndim == 2 and mask.shape not in sizes:
            return another_size(path, mask.shape, sizes[0])
        if number is not None:
            labels_of(path, mask, number, {IGNORED})
    label = sample.get('gt_label')
    if label is not None and number is not None:
        wrong = [v for v in np.atleast_1d(np.asarray(label.cpu())).tolist() if not 0 <= v < number]
        if wrong and isinstance(wrong[0], int):
            return label_beyond(path, wrong[0], number)
    return None
