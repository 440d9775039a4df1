"""Annotation files: what they lack, after a failure; what nobody would say, when they are read.

pycocotools keeps the last of two entries with one id, and the hosts pass over annotations of images
and categories that there are not: the result is quietly another one.
"""

import json
import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from mmengine.config import Config

from wsbcn_mm.openmmlab.config import type_name
from wsbcn_mm.openmmlab.data.reading import DataError, warn
from wsbcn_mm.openmmlab.data.segments import Segments, look_at
from wsbcn_mm.openmmlab.loaders import datasets_of


def is_number(value: object) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_box(value: object) -> bool:
    """Whether a value is [x, y, width, height]."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_id(value: object) -> bool:
    return isinstance(value, (int, str))


def _is_flag(value: object) -> bool:
    return value in (0, 1)


# What mmdet and pycocotools read of every entry, by the list of a COCO file that holds them: what
# belongs there in words, and as a test.
ENTRIES: dict[str, dict[str, tuple[str, Callable[[object], bool]]]] = {
    'images': {
        'id': ('a number of its own', _is_id),
        'file_name': ('the name of its file, below data_prefix', _is_text),
        'height': ('a number, in pixels', is_number),
        'width': ('a number, in pixels', is_number),
    },
    'annotations': {
        'id': ('a number of its own', _is_id),
        'image_id': ('the id of its image', _is_id),
        'category_id': ('the id of its category', _is_id),
        'bbox': ('[x, y, width, height] in numbers', is_box),
        'area': ('a number: that of the mask, or width * height of the box', is_number),
        'iscrowd': ('0', _is_flag),
    },
    'categories': {
        'id': ('a number of its own', _is_id),
        'name': ('the name of the class', _is_text),
    },
}

# What files of other formats lack, by a key that they alone have: LVIS's, and panoptic ones.
OTHERS: dict[str, dict[str, tuple[str, ...]]] = {
    'coco_url': dict(images=('file_name',), annotations=('iscrowd',)),
    'not_exhaustive_category_ids': dict(annotations=('iscrowd',)),
    'segments_info': dict(annotations=('id', 'category_id', 'bbox', 'area', 'iscrowd')),
}


# ---- after a failure -----------------------------------------------------------------------------


def damaged_annotations(cfg: Config, *loaders: str) -> list[str]:
    """A line for each COCO annotation file of these loaders that is damaged or lacks something.

    Reads them all: for the time after something has failed.
    """
    lines: list[str] = []
    files: dict[Path, str] = {}
    for loader, dataset in datasets_of(cfg, *loaders):
        file = dataset.get('ann_file')
        if file and isinstance(file, str) and _is_coco(dataset):
            files.setdefault(Path(dataset.get('data_root') or '', file), loader)
    for path, loader in files.items():
        if path.is_file():
            try:
                content = json.loads(path.read_text('utf-8'))  # as pycocotools does
            except ValueError as error:
                lines.append(f'{loader}: {path} is damaged: {error}{_beginning(path)}')
                continue
            lines += [f'{loader}: {path} {reason}' for reason in _wrong_with(content)]
    return lines


def _is_coco(dataset: dict) -> bool:
    return dataset['ann_file'].endswith('.json') or 'Coco' in type_name(dataset)


def _beginning(path: Path) -> str:
    start = path.read_bytes()[:40]
    if start.startswith((b'{', b'[')) or not start.isascii():
        return ''
    first = start.decode().splitlines()
    return f"\n  it begins with {first[0]!r}, and COCO's JSON is read" if first else ': it is empty'


# Who reads annotation files, and what is in them, by the beginning of the module's name. Transforms
# of images are no part of them.
READERS = (
    'json.decoder',
    'mmdet.datasets.api_wrappers',
    'mmdet.datasets.coco',
    'mmdet.evaluation',
    'pycocotools',
)


def comes_from_annotations(error: BaseException) -> bool:
    """Whether an error, or one that it came from, was raised below code that reads annotations.

    What a module lacks (``np.float``) is no matter of a file.
    """
    if isinstance(getattr(error, 'obj', None), ModuleType) or isinstance(error, ImportError):
        return False
    seen: set[int] = set()
    chain: BaseException | None = error
    while chain is not None and id(chain) not in seen:
        seen.add(id(chain))
        frames = traceback.walk_tb(chain.__traceback__)
        if any(str(f.f_globals.get('__name__')).startswith(READERS) for f, _ in frames):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def _wrong_with(content: object) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f'is damaged: a {type(content).__name__} instead of an object'
        return
    other = next((lacks for key, lacks in OTHERS.items() if _have(content, key)), {})
    for name, keys in ENTRIES.items():
        entries = content.get(name)
        if not isinstance(entries, list):
            if entries is not None or name != 'annotations':  # images of a test may have none
                keys_there = ', '.join(list(content)[:8]) or 'nothing'
                yield (
                    f"has no list {name!r}, but {keys_there}: COCO's format is needed, one file "
                    'for all images'
                )
            continue
        others = [i for i, entry in enumerate(entries) if not isinstance(entry, dict)]
        if others:
            yield f'has {len(others)} {name} that are no objects (first number {others[0]})'
            continue
        for key, (words, fits) in keys.items():
            if key in other.get(name, ()):
                continue
            yield from _wrong_values(name, entries, key, words, fits)
        yield from twice(name, entries)


def _have(content: dict[str, Any], key: str) -> bool:
    """Whether the first entry of a list has it."""
    lists = (content.get(name) for name in ENTRIES)
    return any(isinstance(e, list) and e and isinstance(e[0], dict) and key in e[0] for e in lists)


def _wrong_values(
    name: str, entries: list[Any], key: str, words: str, fits: Callable[[object], bool]
) -> Iterator[str]:
    lacking = [i for i, entry in enumerate(entries) if key not in entry]
    wrong = [i for i, entry in enumerate(entries) if key in entry and not fits(entry[key])]
    for found, what in ((lacking, f'without {key!r}'), (wrong, f'whose {key} is not {words}')):
        if found:
            entry = entries[found[0]]
            number = entry.get('id')
            first = f'number {found[0]}' if number is None else f'id {number}'
            value = f': {entry[key]!r}' if key in entry else ''
            mend = '' if key in entry else f'\n  add it: {words}'
            yield f'has {len(found)} {name} {what} (first {first}{value}){mend}'


# ---- when they are read --------------------------------------------------------------------------


def twice(name: str, entries: list[Any]) -> Iterator[str]:
    """Entries with one id, unless they are the same; categories with one name."""
    numbers = Counter(entry['id'] for entry in entries if _is_id(entry.get('id')))
    several = {number for number, count in numbers.items() if count > 1}
    if several:
        found: dict[Any, dict] = {}
        for entry in entries:
            if entry.get('id') in several and found.setdefault(entry['id'], entry) != entry:
                other = found[entry['id']]
                shown = [str(e.get('file_name') or e.get('name') or '') for e in (other, entry)]
                names = f' ({" and ".join(shown)})' if all(shown) else ''
                yield (
                    f'has several {name} of one id, and the last of them alone is used: id '
                    f'{entry["id"]}{names}\n  give each an id of its own'
                )
                return


def _nowhere(content: dict[str, Any], key: str, known: Any, what: str) -> tuple[int, str]:
    """How many annotations belong to an image or category that the file lacks, and that in words.

    Args:
        content: The file.
        key: How annotations name it.
        known: The ids that there are.
        what: What it is called.
    """
    lost = [a[key] for a in content['annotations'] if a[key] not in known]
    if not lost:
        return 0, ''
    example = next(iter(known), None)
    return len(lost), (
        f'has {len(lost)} of {len(content["annotations"])} annotations of {what} that it does not '
        f'list, and they are left out: {key} {lost[0]!r}, where there are ids such as {example!r}'
    )


def check_index(coco: Any, file: str) -> list[str]:
    """What is quietly lost of a file that pycocotools has read.

    Args:
        coco: Its object, with the index.
        file: For messages.

    Returns:
        Sentences on what may be meant.

    Raises:
        DataError: what cannot be meant.
    """
    content, notes = coco.dataset, []
    for name, index in (('images', coco.imgs), ('annotations', coco.anns)):
        entries = content.get(name) or []
        if len(entries) != len(index):
            for text in twice(name, entries):
                raise DataError(f'{file} {text}')
    if not content.get('annotations'):
        return []
    for key, known, index, what in (
        ('image_id', coco.imgs, coco.imgToAnns, 'images'),
        ('category_id', coco.cats, coco.catToImgs, 'categories'),
    ):
        if index.keys() <= known.keys():
            continue
        count, text = _nowhere(content, key, known, what)
        if count == len(content['annotations']):
            raise DataError(f'{file} {text}\n  write the ids as they are there, text or number')
        notes.append(f'{file} {text}')
    without = _without_size(content['annotations'])
    return notes if without is None else [*notes, f'{file} {without}']


def _without_size(entries: list[dict[str, Any]]) -> str | None:
    """How many boxes are none; a few of no width or height alone are a matter of drawing."""
    odd = [a for a in entries if _is_odd(a.get('bbox'))]
    flat = all(is_box(a['bbox']) and min(a['bbox'][2:]) == 0 for a in odd)
    if not odd or (flat and len(odd) * 100 < len(entries)):
        return None
    first = next((a for a in odd if not is_box(a['bbox']) or min(a['bbox'][2:]) < 0), odd[0])
    return (
        f'has {len(odd)} of {len(entries)} annotations whose box is none (id {first.get("id")}: '
        f'{first["bbox"]}): MMDetection leaves them out, or learns NaN of them\n  write bbox as '
        '[x, y, width, height] in pixels, the latter above 0'
    )


def _is_odd(box: Any) -> bool:
    """Four numbers that are no [x, y, width, height]; what is none at all raises in the host."""
    if not isinstance(box, list) or len(box) != 4 or not {*map(type, box)} <= {int, float}:
        return False
    x, y, width, height = box
    return not (0 < width < math.inf and 0 < height < math.inf and math.isfinite(x + y))


@dataclass
class Read:
    """What is remembered of a file that pycocotools has read.

    Attributes:
        names: Those of the categories, in its order.
        segments: What its segmentations are.
    """

    names: list[str]
    segments: Segments


files_read: dict[str, Read] = {}


@contextmanager
def looked_at() -> Iterator[None]:
    """Looks at each COCO file that is read meanwhile; see `check_index`.

    The file is in memory then, whole and with its index: the look at COCO's 118,000 images takes
    less than a second, where reading them anew would take twenty.
    """
    if find_spec('pycocotools') is None:
        yield
        return
    from pycocotools.coco import COCO

    original = COCO.__init__
    files_read.clear()

    def read(self, annotation_file=None):
        original(self, annotation_file)
        file = str(annotation_file)
        own = type(self).createIndex is COCO.createIndex  # panoptic files have other entries
        if annotation_file is None or not own or file in files_read:
            return
        names = [c.get('name') for c in self.dataset.get('categories') or []]
        entries = self.dataset.get('annotations') or []
        files_read[file] = Read(names, look_at(entries, self.imgs))
        for note in check_index(self, file):
            warn(note)

    with mock.patch.object(COCO, '__init__', read):
        yield
