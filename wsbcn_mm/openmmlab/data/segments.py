"""Segmentations of a COCO file that are none: found when it is read, said where masks are used.

MMDetection leaves polygons of less than three points out; what an RLE of too few pixels does not
say, pycocotools takes from memory as it happens to be; one whose sides are swapped is another mask.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

EXPECTED = (
    'a list of polygons, [[x1, y1, x2, y2, x3, y3, ...]], or an RLE of the size of the image, '
    '[height, width], whose runs make up its pixels; or take the object out'
)
COUNTED = 300_000  # runs, or characters in short, that are read of a file: a tenth of a second


def wrong_mask(mask: Any, size: list[Any]) -> str | None:
    """What is wrong with a segmentation of COCO's format; None where nothing is.

    Polygons that are left out are not; see `left_out`.

    Args:
        mask: Polygons or an RLE.
        size: (height, width) of the image.
    """
    if not mask:
        return 'is missing or empty'
    if isinstance(mask, dict):
        return _wrong_size(mask, size) or _wrong_counts(mask)
    if not isinstance(mask, list):
        return f'is a {type(mask).__name__}'
    if not all(isinstance(polygon, list) for polygon in mask):
        return 'is one list of numbers, not a list of such lists'
    if any(not isinstance(x, (int, float)) for polygon in mask for x in polygon):
        return 'holds something else than numbers'
    return None


def _wrong_size(mask: dict[str, Any], size: list[Any]) -> str | None:
    found = mask.get('size')
    if found == size or (None in size and isinstance(found, list) and len(found) == 2):
        return None
    swapped = ' (height first)' if isinstance(found, list) and found[::-1] == size else ''
    return f'is an RLE of size {found}, and the image has {size}{swapped}'


def _wrong_counts(mask: dict[str, Any]) -> str | None:
    counts: Any = mask.get('counts')
    try:
        pixels = mask['size'][0] * mask['size'][1]
        found = _pixels(counts) if isinstance(counts, str) else sum(counts)
        least = 0 if isinstance(counts, str) else min(counts, default=0)
    except TypeError:
        return f'is an RLE whose counts are a {type(counts).__name__}, not a list or a text'
    if found == pixels and least >= 0:
        return None
    return f'is an RLE of {found:g} pixels, and its size {mask["size"]} has {pixels}'


def _pixels(counts: str) -> int:
    """The sum of the runs of an RLE in short: 5 bits a character, each but three a difference."""
    runs: list[int] = []
    value = shift = 0
    for character in counts.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return sum(runs)


def _left_out(polygons: list[Any]) -> str | None:
    """Why MMDetection takes one of the polygons for none."""
    for polygon in polygons:
        if len(polygon) % 2:
            return f'has a polygon of {len(polygon)} numbers, which are no pairs x, y'
        if len(polygon) < 6:
            return f'has a polygon of {len(polygon)} numbers, less than three points'
    return None


@dataclass
class Found:
    """The same fault of several objects."""

    count: int = 0
    first: Any = None  # id of the annotation
    text: str = ''
    mask: Any = None
    file_name: Any = None  # of its image

    def add(self, number: Any, text: str, mask: Any = None, file_name: Any = None) -> None:
        """One more."""
        if not self.count:
            self.first, self.text, self.mask, self.file_name = number, text, mask, file_name
        self.count += 1


@dataclass
class Segments:
    """What the segmentations of a file are, by the id of the category.

    Attributes:
        wrong: Those that cannot be read as a mask of their image.
        short: Those with a polygon that counts for none.
        ends: Those of them at which pycocotools stops when it evaluates.
        encoded: How many objects are RLEs, crowds aside.
    """

    wrong: dict[Any, Found] = field(default_factory=lambda: defaultdict(Found))
    short: dict[Any, Found] = field(default_factory=lambda: defaultdict(Found))
    ends: dict[Any, Found] = field(default_factory=lambda: defaultdict(Found))
    encoded: Counter[Any] = field(default_factory=Counter)


def look_at(annotations: Iterable[dict[str, Any]], images: dict[Any, dict[str, Any]]) -> Segments:
    """Looks at all segmentations of a file; COCO's 860,000 take less than a second.

    Args:
        annotations: Its entries.
        images: Those of the images, by id.
    """
    found, encoded, length = Segments(), [], 0
    for entry in annotations:
        mask = entry.get('segmentation')
        if isinstance(mask, list) and mask and all(isinstance(p, list) for p in mask):
            for polygon in mask:
                if len(polygon) % 2 or len(polygon) < 6:
                    break
            else:
                continue  # nearly all
            category, number = entry.get('category_id'), entry.get('id')
            text = _left_out(mask) or ''
            found.short[category].add(number, text)
            if len(mask[0]) <= 4:
                found.ends[category].add(number, text)
        elif isinstance(mask, dict) and isinstance(mask.get('counts'), (str, list)):
            encoded.append(entry)
            length += len(mask['counts'])
        else:
            _look_closely(found, entry, images.get(entry.get('image_id'), {}))
    step = 1 + length // COUNTED
    for i, entry in enumerate(encoded):
        image = images.get(entry.get('image_id'), {})
        same = entry['segmentation'].get('size') == [image.get('height'), image.get('width')]
        if not entry.get('iscrowd'):
            found.encoded[entry.get('category_id')] += 1
        if i % step == 0 or not same:
            _look_closely(found, entry, image)
    return found


def _look_closely(found: Segments, entry: dict[str, Any], image: dict[str, Any]) -> None:
    mask, size = entry.get('segmentation'), [image.get('height'), image.get('width')]
    text = wrong_mask(mask, size)
    if text is not None and _is_used(entry):
        kind = found.wrong[entry.get('category_id')]
        kind.add(entry.get('id'), text, mask, image.get('file_name'))


def _is_used(entry: dict[str, Any]) -> bool:
    """Whether MMDetection looks at an object at all."""
    box = entry.get('bbox')
    numbers: list[Any] = [*box[2:], entry.get('area', 1)] if isinstance(box, list) else []
    if entry.get('ignore') or not all(isinstance(n, (int, float)) for n in numbers):
        return False
    return len(numbers) == 3 and min(numbers[:2]) >= 1 and numbers[2] > 0


def said(found: dict[Any, Found], categories: Iterable[Any]) -> str | None:
    """How many objects of these categories have a fault, and the first of them; None: none has."""
    those = [found[c] for c in categories if c in found]
    if not those:
        return None
    count, first = sum(f.count for f in those), those[0]
    others = f' (and {count - 1} more)' if count > 1 else ''
    return f'the segmentation of annotation {first.first}{others} {first.text}'
