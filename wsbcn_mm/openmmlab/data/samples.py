"""Some images of a data set as its pipeline reads them, against what is said about them.

Few files are read; what is in memory already may be looked at whole.
"""

import difflib
import itertools
import os
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
from mmengine.dataset import Compose

from wsbcn_mm.openmmlab.data import annotations, segments
from wsbcn_mm.openmmlab.data.reading import DataError, is_left_behind, is_there, missing, warn

IGNORED = 255  # what a mask says where it says nothing, in mmsegmentation
FEW, MANY = 8, 200  # images that are looked at
ENOUGH = 20  # so many images, and one class alone: that is not how they were drawn
BACKGROUND = ('background', 'bg', '_background_')


def _some(dataset: Any, count: int) -> list[int]:
    """The numbers of some images, the same every time."""
    return np.random.default_rng(0).permutation(len(dataset))[:count].tolist()


def _loader(dataset: Any, name: str) -> Compose | None:
    """The step of a data set's pipeline whose name begins so; its errors name the file."""
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    step = next((s for s in steps if type(s).__name__.startswith(name)), None)
    return None if step is None else Compose([step])


def _size_of_image(dataset: Any) -> Callable[[dict], tuple[int, ...] | None]:
    """Answers (height, width) of an image as it is read; None where it is not read from a file."""
    load = _loader(dataset, 'LoadImage')

    def size(info: dict) -> tuple[int, ...] | None:
        if load is None or not isinstance(info.get('img_path'), str):
            return None
        data = load(dict(info))
        image = None if data is None else data.get('img')
        return tuple(image.shape[:2]) if isinstance(image, np.ndarray) else None

    return size


def check_left_behind(dataset: Any) -> None:
    """Folders that nobody has put there are neither classes nor images: the hosts list all.

    Raises:
        DataError: one is a class, or an image in one has no mask.
    """
    kind = type(dataset).__name__
    root = str((getattr(dataset, 'data_prefix', None) or {}).get('img_path') or '')
    for folder in filter(is_left_behind, getattr(dataset, 'folder_to_idx', None) or ()):
        raise DataError(f'{kind}: {class_left_behind(os.path.join(root, folder))}')
    # Of MMSegmentation's alone, a hundred thousand at most: an image more is no harm to classes.
    is_listed = getattr(dataset, 'ann_file', None) or not hasattr(dataset, 'seg_map_suffix')
    if is_listed or not os.path.isdir(root):
        return
    infos = map(dataset.get_data_info, range(len(dataset)))
    odd = [i for i in infos if is_left_behind(os.path.relpath(str(i.get('img_path')), root))]
    if not odd:
        return
    masks = [str(i['seg_map_path']) for i in odd if i.get('seg_map_path')]
    text = f'{kind}: {len(odd)} of {len(dataset)} images lie in such folders as'
    text = f'{text} {os.path.dirname(odd[0]["img_path"])}, which {REMOVE}'
    if _mask_reader(dataset) is not None and not all(map(is_there, masks)):
        raise DataError(text)
    warn(text)


REMOVE = 'an editor or a system has made: remove the folder'


def class_left_behind(folder: str) -> str:
    """A folder is taken for a class."""
    return f'{folder} is taken for a class, and the labels of others shift\n  it is what {REMOVE}'


# ---- detection -----------------------------------------------------------------------------------


def check_objects(dataset: Any, learned: bool) -> None:
    """Training data of a detector have an object that counts; test data, if they have any.

    Raises:
        DataError: MMDetection leaves all of them out.
    """
    annotated = any((getattr(dataset, 'cat_img_map', None) or {}).values())
    if not hasattr(dataset, 'cat_ids') or not (learned or annotated):
        return
    if _loader(dataset, 'LoadAnnotations') is None:  # a teacher's images have none
        return
    for index in itertools.chain(_some(dataset, MANY), range(len(dataset))):
        objects = dataset.get_data_info(index).get('instances')
        if objects is None or any(not o.get('ignore_flag') for o in objects):
            return
    text = (
        f'{type(dataset).__name__}: no image of {getattr(dataset, "ann_file", "it")} has an object '
        'that counts\n  MMDetection leaves out those of other classes than metainfo.classes, with '
        'iscrowd=1, with an area of 0, with a width or height below 1 pixel (are they fractions of '
        'the image?), and those beyond the width and height that the file says of their image'
    )
    if learned:
        raise DataError(text)
    warn(text)


def _fits_the_file(dataset: Any, wrong: dict[Any, segments.Found]) -> bool:
    """Whether the first is a mask of its image as it is read, which has another size than said."""
    first = next(wrong[number] for number in dataset.cat_ids if number in wrong)
    folder = (getattr(dataset, 'data_prefix', None) or {}).get('img')
    if not isinstance(folder, str) or not isinstance(first.file_name, str):
        return False
    path = os.path.join(folder, first.file_name)
    size = _size_of_image(dataset)(dict(img_path=path)) if os.path.isfile(path) else None
    return size is not None and segments.wrong_mask(first.mask, list(size)) is None


def check_segments(dataset: Any) -> None:
    """The masks that the pipeline loads are those of their images.

    Raises:
        DataError: one that cannot be read, or would be another.
    """
    read = annotations.files_read.get(str(getattr(dataset, 'ann_file', None)))
    steps = getattr(getattr(dataset, 'pipeline', None), 'transforms', [])
    load = next((step for step in steps if getattr(step, 'with_mask', False)), None)
    if read is None or load is None or not hasattr(dataset, 'cat_ids'):
        return
    where, found = f'{type(dataset).__name__} ({dataset.ann_file})', read.segments
    encoded = sum(found.encoded[number] for number in dataset.cat_ids)
    if getattr(load, 'poly2mask', True):
        text = segments.said(found.wrong, dataset.cat_ids)
        if text and not _fits_the_file(dataset, found.wrong):
            raise DataError(f'{where}: {text}\n  write {segments.EXPECTED}')
    elif encoded:
        text = f'{where}: {encoded} objects are RLEs, which LoadAnnotations leaves out with '
        warn(f'{text}poly2mask=False')
    if text := segments.said(found.short, dataset.cat_ids):
        text = f'{where}: {text}: it is left out, and the object, where it has no other'
        warn(f'{text}\n  write {segments.EXPECTED}')


def check_names_of_xml(dataset: Any, classes: list[str]) -> None:
    """The names in VOC's XML files are those of the classes; MMDetection leaves others out.

    Raises:
        DataError: a class has no object, and others have a name that is nearly its.
    """
    found: set[str | None] = set()
    for number, index in enumerate(_some(dataset, len(dataset))):
        info = dataset.get_data_info(index)
        path = info.get('xml_path') if isinstance(info, dict) else None
        if not isinstance(path, str) or not os.path.isfile(path):
            return
        found |= {name.text for name in ElementTree.parse(path).iterfind('object/name')}
        others = [name for name in found if name and name not in classes]
        meant = alike([name for name in classes if name not in found], others, cutoff=0.8)
        if not meant and number >= MANY:
            return
    if meant:
        raise DataError(
            f'{type(dataset).__name__}: {getattr(dataset, "ann_file", "")}: its XML files call '
            f'objects {", ".join(sorted(others)[:4])}, which are left out\n  is it {meant}?'
            '\n  write the names of metainfo.classes as the files do'
        )


def alike(missing: list[str], others: list[str], cutoff: float = 0.6) -> str:
    """Which of the names that are missing may be meant by those that are there."""
    near = [difflib.get_close_matches(name, others, n=1, cutoff=cutoff) for name in missing[:4]]
    return ', '.join(f'{a!r} for {b[0]!r}' for a, b in zip(missing, near) if b)


def check_boxes(dataset: Any) -> None:
    """Boxes count, and end behind where they begin; COCO's are looked at when they are read."""
    if hasattr(dataset, 'cat_ids'):
        return
    there = counted = 0
    for index in _some(dataset, MANY):
        info = dataset.get_data_info(index)
        objects = info.get('instances') if isinstance(info, dict) else None
        boxes = [o['bbox'] for o in objects or [] if not o.get('ignore_flag') and 'bbox' in o]
        there, counted = there + len(objects or []), counted + len(boxes)
        corners = np.array([box for box in boxes if len(box) == 4], float).reshape(-1, 4)
        wrong = ~(corners[:, 2:] > corners[:, :2]).all(1)  # NaN is no order
        if wrong.any():
            warn(
                f'{type(dataset).__name__}: {info.get("xml_path") or info.get("img_path")} '
                f'has the box {corners[wrong][0].tolist()}, which ends before it begins or where '
                'it does (x1, y1, x2, y2): the loss may be NaN\n  correct it, or set '
                'filter_cfg=dict(bbox_min_size=1) where the data set takes that'
            )
            return
    if there and not counted:
        warn(
            f'{type(dataset).__name__}: all {there} objects of the images looked at are to '
            'be ignored (marked as difficult, or smaller than bbox_min_size): nothing is learned '
            'of them'
        )


def check_images(dataset: Any) -> None:
    """Images have the size that their annotations say, and boxes lie inside.

    Raises:
        DataError: another size, and boxes beyond the image.
    """
    size_of, unlike, boxes, beyond = _size_of_image(dataset), [], 0, 0
    for index in _some(dataset, FEW):
        info = dataset.get_data_info(index)
        is_whole = {'height', 'width', 'instances'} <= info.keys()
        size = size_of(info) if is_whole else None
        if size is None:
            continue
        if (info['height'], info['width']) != size:
            unlike.append((info, size))
        found = np.array([o['bbox'] for o in info.get('instances') or []], float).reshape(-1, 4)
        boxes += len(found)
        # As much as a twentieth may be a matter of drawing, or of what an edge is.
        beyond += int((found[:, 2:] > 1.05 * np.array(size[::-1]) + 1).any(axis=1).sum())
    kind = f'{type(dataset).__name__} ({getattr(dataset, "ann_file", "")})'
    if unlike:
        info, size = unlike[0]
        text = (
            f'{kind}: {len(unlike)} of {min(FEW, len(dataset))} images have another size than it '
            f'says: {info["img_path"]} is {size[1]} x {size[0]} as it is read, and width x height '
            f'are {info["width"]} x {info["height"]} there'
        )
        hint = channels_first(size, (info['height'], info['width']))
        if beyond:
            raise DataError(
                f'{text}, and boxes lie beyond the image\n'
                + (
                    hint
                    or '  are the annotations those of these images, before they were resized or '
                    'turned (EXIF)? Scale them, or take the others'
                )
            )
        warn(text + f'\n{hint}' * bool(hint))
    elif boxes and beyond > boxes / 2:
        text = f'{kind}: {beyond} of {boxes} boxes lie beyond their image'
        mend = 'bbox is [x, y, width, height], not [x1, y1, x2, y2]'
        warn(f'{text}: {mend}')


# ---- classification ------------------------------------------------------------------------------


def check_labels(dataset: Any, num_classes: int, learned: bool) -> None:
    """Labels of images and videos are those of classes that there are.

    Test data may have others: where people are found again, they are not those of the training.

    Raises:
        DataError: one of training data is too large, or negative.
    """
    if num_classes < 2:
        return
    for index in _some(dataset, MANY):
        info = dataset.get_data_info(index)
        label = info.get('gt_label', info.get('label'))
        if label is None or isinstance(label, (str, dict)):
            return
        for number in np.atleast_1d(np.asarray(label)).ravel().tolist():
            if isinstance(number, int) and (number >= num_classes or (learned and number < 0)):
                path = info.get('img_path') or info.get('filename') or info.get('frame_dir')
                text = label_beyond(str(path), number, num_classes)
                text = f'{type(dataset).__name__} ({getattr(dataset, "ann_file", "")}): {text}'
                if learned:
                    raise DataError(text)
                warn(text)
                return
    names, folders = dataset.metainfo.get('classes'), getattr(dataset, 'folder_to_idx', None)
    for folder, number in (folders or {}).items():
        if names and folder in names and list(names).index(folder) != number:
            raise DataError(
                f'{type(dataset).__name__}: the folder {folder} is class {number}, by the order of '
                f'the alphabet, and metainfo.classes calls that {names[number]!r}\n  write the '
                f'classes in that order: {", ".join(folders or ())}'
            )


def label_beyond(path: str, label: int, num_classes: int) -> str:
    """A label is none of the classes of the model."""
    mend = f'count them from 0, or set num_classes of the head to {label + 1}'
    if label < 0:
        mend = 'the list has no label for it: end its line with one, counted from 0'
    return (
        f'the label of {path} is {label}, and the model has {num_classes} classes (labels 0 to '
        f'{num_classes - 1})\n  {mend}'
    )


# ---- segmentation --------------------------------------------------------------------------------


def check_masks(dataset: Any, classes: Any, ignored: set[int], learned: bool) -> None:
    """Masks are of their images and hold labels of classes that there are, and more than one.

    Args:
        dataset: Of mmsegmentation; others are passed over.
        classes: The names.
        ignored: Labels that mean nothing.
        learned: It is trained on.

    Raises:
        DataError: with the first mask that cannot be meant.
    """
    num_classes, read = len(classes), _mask_reader(dataset)
    if read is None:
        return
    seen: set[int] = set()
    order = _some(dataset, MANY)
    for first in itertools.islice(order, FEW):
        seen |= labels_of(*read(first), num_classes, ignored)
    _check_sizes(dataset, read)
    reduced, more = dataset.reduce_zero_label, iter(order[FEW:])
    while learned and seen <= ignored and (i := next(more, None)) is not None:
        seen |= labels_of(*read(i), num_classes, ignored)
    if learned and seen <= ignored:
        raise DataError(
            f'the masks of {type(dataset).__name__} ({read(order[0])[0]}, ...) hold '
            f'{", ".join(map(str, sorted(seen)))} alone, which means "ignore": there is nothing to '
            'learn\n  write them as class numbers: 0 for the first class, 1 for the second'
        )
    if reduced and classes[0] in BACKGROUND and num_classes - 1 not in seen:
        warn(
            f'reduce_zero_label=True leaves out the label 0 of the masks, {classes[0]!r} of '
            f'{type(dataset).__name__} is their label 1 then, and {classes[-1]!r} was in none of '
            'those looked at: is label 0 the background? Then set reduce_zero_label=False'
        )
    if reduced and len(order) < ENOUGH:  # 0 and 255 are 1 and 0 in the file: one class of several
        return
    while seen == {0, IGNORED} and (i := next(more, None)) is not None:
        seen |= labels_of(*read(i), num_classes, ignored)
    if seen == {0, IGNORED} and num_classes > 1 and reduced:
        raise DataError(
            f'with reduce_zero_label=True the masks of {type(dataset).__name__} '
            f'({read(order[0])[0]}, ...) are class 0 and "ignore" alone: the label 0 of the files '
            'is no class then\n  set reduce_zero_label=False where it is one (the background)'
        )
    if seen == {0, IGNORED} and num_classes > 1:
        raise DataError(
            f'the masks of {type(dataset).__name__} ({read(order[0])[0]}, ...) are 0 and 255 '
            'alone, and 255 means "ignore": nothing of the object would count\n'
            '  write them as class numbers: 0 for the background, 1 for the object'
        )


def _check_sizes(dataset: Any, read: Callable[[int], tuple[str, np.ndarray]]) -> None:
    """A mask of another size than its image is learned in some pipelines, and tested in none."""
    size_of = _size_of_image(dataset)
    for i in _some(dataset, FEW):
        size = size_of(dataset.get_data_info(i))
        path, mask = read(i)
        if size is not None and mask.shape != size:
            warn(another_size(path, mask.shape, size))
            return


def another_size(path: str, shape: tuple[int, ...], image: tuple[int, ...]) -> str:
    """A mask is not of the size (height, width) of its image."""
    return (
        f'the mask {path} is {shape[1]} x {shape[0]}, and its image {image[1]} x {image[0]}\n'
        + (
            channels_first(image, shape)
            or '  write it at the size of the image, without interpolation between class numbers'
        )
    )


def channels_first(image: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What to do about an image whose first axis seems to be its channels; '' for another.

    Args:
        image: Its first two axes as it is read.
        wanted: The size (height, width) that it should have.
    """
    if image[1] != wanted[0] or image[0] == wanted[0]:
        return ''
    return (
        f'  are the {image[0]} channels of the image its first axis? The hosts read (height, '
        'width, channels): write it so, or put a step of your own behind the one that loads it'
    )


def labels_of(path: str, mask: np.ndarray, num_classes: int, ignored: set[int]) -> set[int]:
    """The class numbers in a mask.

    Args:
        path: For messages.
        mask: As it is read.
        num_classes: That there are.
        ignored: Labels that mean nothing.

    Raises:
        DataError: it is no mask, or holds another number.
    """
    if mask.ndim != 2:
        raise DataError(
            f'{path} is a picture of shape {mask.shape}, not a mask with one class number per '
            'pixel\n  convert colours to class numbers (a PNG with a palette holds them, too)'
        )
    labels = set(np.unique(mask).tolist())
    wrong = sorted(label for label in labels - ignored if label >= num_classes)
    if wrong:
        raise DataError(
            f'{path} holds the label {wrong[0]}, and the config has {num_classes} classes '
            f'(labels 0 to {num_classes - 1}, {IGNORED} to ignore)\n  name all classes in '
            'metainfo, or write the masks anew'
            + (
                '; or set reduce_zero_label=True, where 0 is no class and 1 the first'
                if wrong == [num_classes]
                else ''
            )
            + (
                '\n  JPEG keeps no numbers: write PNG'
                if path.lower().endswith(('.jpg', '.jpeg'))
                else ''
            )
        )
    return labels


def _mask_reader(dataset: Any) -> Callable[[int], tuple[str, np.ndarray]] | None:
    """Reads a mask as the data set's pipeline does; None where it reads none."""
    load = _loader(dataset, 'LoadAnnotations')
    if load is None or not hasattr(dataset, 'seg_map_suffix') or not hasattr(dataset, 'label_map'):
        return None  # not a segmentation of mmsegmentation
    step = load.transforms[0]
    arguments = getattr(step, 'file_client_args', None) or getattr(step, 'backend_args', None)

    def read(index: int) -> tuple[str, np.ndarray]:
        info = dataset.get_data_info(index)
        path = info.get('seg_map_path')
        if not path or not is_there(path, arguments):
            image = info.get('img_path')
            mend = missing(str(path if image is None or os.path.exists(image) else image))
            file = getattr(dataset, 'ann_file', '')
            kind = type(dataset).__name__ + (f' ({file})' if file else '')
            raise DataError(f'{kind}: no mask {path} for {image}\n  {mend}')
        data = load(info)
        assert data is not None
        return path, data['gt_seg_map']

    return read
