"""Why a file of data could not be read, and what to do.

The hosts raise the error of whatever read it, without a name; `apply` adds it.
"""

import difflib
import logging
import os
import re
import traceback
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from wsbcn_mm.openmmlab.data.segments import EXPECTED, wrong_mask
from wsbcn_mm.openmmlab.patches import surround

# What decodes images, and the package that it needs; None: mmcv has it.
DECODERS = dict(cv2=None, pillow=None, tifffile='tifffile', turbojpeg='turbojpeg')
TIFF = (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')  # how such a file begins
FEW = 2000  # names among which a similar one is looked for


class DataError(RuntimeError):
    """An image or its annotation could not be read."""


def warn(text: str) -> None:
    """Says in the log what is odd about the data."""
    print_log(f'data: {text}', 'current', logging.WARNING)


def apply() -> None:
    """Lets the hosts say which file they could not read; may be called more than once."""
    name_the_file_of_a_failed_transform()
    say_where_no_image_is()


def name_the_file_of_a_failed_transform() -> None:
    """Adds to an error in a data pipeline which file and annotation it was about."""
    from mmengine.dataset.base_dataset import Compose

    surround(Compose, '__call__', _compose)


def _compose(original: Callable[..., dict | None], pipeline: Any, data: dict) -> dict | None:
    try:
        return original(pipeline, data)
    except DataError:
        raise
    except Exception as error:
        names = ('img_path', 'seg_map_path', 'filename', 'frame_dir')
        files = [str(data[n]) for n in names if isinstance(data, dict) and data.get(n)]
        if not files:
            raise
        raise DataError(
            f'reading {" or ".join(files)} failed: {type(error).__name__}: {error}\n'
            f'  {mend_of(pipeline.transforms, error, data)}'
        ) from error


def say_where_no_image_is() -> None:
    """Names the place and the settings of a data set that has no image."""
    from mmengine.dataset import BaseDataset

    surround(BaseDataset, '_serialize_data', _serialize_data)


def _serialize_data(original: Callable[..., Any], dataset: Any) -> Any:
    if not dataset.data_list:
        raise DataError(no_image_in(dataset))
    return original(dataset)


def no_image_in(dataset: Any) -> str:
    """Where a data set without images looked for them, and what may have kept them out."""
    prefixes = getattr(dataset, 'data_prefix', None) or {}
    places = ', '.join(str(p) for p in (getattr(dataset, 'ann_file', ''), *prefixes.values()) if p)
    text = f'{type(dataset).__name__} has no image: {places}'
    suffix = getattr(dataset, 'img_suffix', None)
    if suffix:
        text += f'\n  img_suffix={suffix!r}: do the names end like that?'
    if getattr(dataset, 'filter_cfg', None):
        classes = ', '.join(map(str, list(dataset.metainfo.get('classes') or ())[:4]))
        text += f'\n  filter_cfg={dict(dataset.filter_cfg)}: have they objects of {classes}, ...?'
    return text


def mend_of(transforms: list[Any], error: Exception, data: dict[str, Any]) -> str:
    """What to do about a pipeline that failed.

    Args:
        transforms: The steps; the one that failed is that in whose code the error is.
        error: What it raised.
        data: What the first step was given.
    """
    from mmengine.fileio import get_file_backend

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    path = str(data.get('img_path') or data.get('filename') or '')
    if '://' in path and isinstance(error, (KeyError, FileNotFoundError)):
        return (
            'the name is an address, and files are read: download the images, and write their '
            'names below data_prefix'
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return missing(str(error.filename), data)
    inside = [frame.f_locals.get('self') for frame in frames]
    step = next((t for t in transforms if any(t is other for other in inside)), None)
    if lacks := _decoder_lacks(step):
        return lacks
    if isinstance(error, ImportError) or any(
        frame.f_code is get_file_backend.__code__ for frame in frames
    ):
        name = str(*error.args[:1])
        if name in DECODERS:
            return (
                f'{name} decodes images and is no storage: write imdecode_backend={name!r} instead'
            )
        return (
            'backend_args names a storage that is not installed or not known: install what it '
            'needs, or set backend_args=None to read files from the disk'
        )
    name = type(step).__name__
    if any(f.f_locals.get(key, error) is None for f in frames for key in ('img_bytes', 'content')):
        return 'the storage that backend_args names has nothing of this name'
    if 'Annotations' in name and (wrong := _wrong_object(data)):
        return wrong
    if isinstance(error, KeyError) and name.startswith('Load') and error.args == ('img',):
        return f'{name} takes an image that is an array already: LoadImageFromFile reads files'
    if step is not None and isinstance(error, KeyError) and not name.startswith('Load'):
        return lacking(step, error)
    if name.startswith('Pack') and (wrong := _wrong_array(data)):
        return wrong
    mixes = hasattr(step, 'get_indexes') or hasattr(step, 'get_indices')
    if mixes and not any('mix_results' in (f.f_locals.get('results') or ()) for f in frames):
        return (
            f'{name} mixes several images, which MultiImageMixDataset gives it: dataset='
            "dict(type='MultiImageMixDataset', dataset=dict(...), pipeline=[...]), with the steps "
            f'that load in the inner pipeline, and {name} and what follows in the outer one'
        )
    if isinstance(error, AssertionError) and 'Annotations' in name:  # of settings, no file
        return f'it failed in {name}: correct its arguments, or those of the data set'
    if step is None or name.startswith('Load') or name.endswith(('Init', 'Decode')):
        file = data.get('seg_map_path') if 'Annotations' in name else path
        damage = damage_of(file) if isinstance(file, str) else None
        where = '' if damage is None else f'{file} {damage}: '
        return f'{where}restore the file, or take it out of the dataset'
    return f'it failed in {name}: correct its arguments in the pipeline, or take the file out'


def is_there(path: str, backend_args: dict[str, Any] | None = None) -> bool:
    """Whether a file exists; True for what lies in a storage, which is asked when it is read.

    Args:
        path: Of the file, or its address.
        backend_args: Of who reads it.
    """
    from mmengine.fileio import LocalBackend, get_file_backend

    if os.path.exists(path):
        return True
    try:
        return type(get_file_backend(path, backend_args=backend_args)) is not LocalBackend
    except (ImportError, KeyError):  # who reads the file says what is missing
        return True


def _decoder_lacks(step: Any) -> str | None:
    """The package that a step's decoder needs and that is not installed."""
    decoder = getattr(step, 'imdecode_backend', None)
    package = DECODERS.get(decoder) if isinstance(decoder, str) else None
    if package is None or find_spec(package):
        return None
    return f'imdecode_backend={decoder!r} needs the package {package}, which is not installed'


def _wrong_array(data: dict[str, Any]) -> str | None:
    """An image that has other axes than a network for images takes."""
    shape = getattr(data.get('img'), 'shape', ())
    if len(shape) in (0, 2, 3):
        return None
    return (
        f'the image is an array of {" x ".join(map(str, shape))} there, and (height, width) or '
        '(height, width, channels) is what is packed: a step of your own behind the one that loads '
        'it makes that'
    )


def is_left_behind(path: str) -> bool:
    """Whether an editor or a system made it: .ipynb_checkpoints, __MACOSX, ._a.png, .DS_Store.

    Args:
        path: Below the folder of the data.
    """
    parts = (part for part in Path(path).parts if part not in ('.', '..'))
    return any(part.startswith('.') or part == '__MACOSX' for part in parts)


def lacking(step: Any, error: KeyError) -> str:
    """What to do about a transform that does not find what an earlier one makes."""
    return (
        f'{type(step).__name__} needs {error.args[0]!r}, which no step of the pipeline before it '
        'gives: LoadImageFromFile gives img, LoadAnnotations what it loads (with_bbox, with_mask, '
        'with_seg)'
    )


def missing(path: str, data: dict[str, Any] | None = None) -> str:
    """What may be meant by a file that does not exist.

    Args:
        path: The file.
        data: What the data set says of it, where more is known.
    """
    folder, name = os.path.split(path)
    frames = (data or {}).get('total_frames')
    if frames is not None and os.path.isdir(folder):
        return (
            f'the list says {frames} frames, called {(data or {}).get("filename_tmpl")}, and the '
            f'folder has {len(os.listdir(folder))} files: write "FOLDER FRAMES LABEL", or set '
            'filename_tmpl'
        )
    if '\\' in path:
        return 'the name has a backslash: write / between folders, which every system reads'
    if '\ufeff' in path:
        return 'its list begins with a byte order mark: save it as UTF-8 without one'
    if not os.path.isdir(folder or '.'):
        there = next((p for p in Path(folder).parents if p.is_dir()), None)
        return (
            f'there is no folder {folder}'
            + (f', and there is {there}' if there else '')
            + ': names in the annotations are those below data_root and data_prefix'
        )
    if os.path.islink(path):
        return f'it is a link to {os.readlink(path)}, which does not exist: restore that'
    stem, suffix = os.path.splitext(name)
    if not stem.strip('.') or name.startswith('.'):
        return 'a name in its list is empty: take the empty line out'
    near = _near(stem, suffix, os.listdir(folder or '.'))
    if near:
        return f'did you mean {" or ".join(near)}? Names, and suffixes, as the files have them'
    return 'restore the file, or take it out of the dataset'


def _near(stem: str, suffix: str, names: list[str]) -> list[str]:
    """The files that a name may stand for: another suffix, other letters' case, a slip."""
    wanted = (stem + suffix).lower()
    same = [n for n in names if n.lower() in (wanted, stem.lower())]
    same = same or [n for n in names if os.path.splitext(n)[0] in (stem, stem + suffix)]
    same = same or [n for n in names if n.startswith((f'{stem}_', f'{stem}-'))]  # 1_mask.png
    if same or len(names) > FEW:
        return same[:3]
    # 002.png is no slip for 001.png.
    numbers = re.findall(r'\d+', stem)
    alike = [n for n in names if re.findall(r'\d+', os.path.splitext(n)[0]) == numbers]
    return difflib.get_close_matches(stem + suffix, alike, n=3, cutoff=0.8)


def damage_of(path: str) -> str | None:
    """What keeps a file from being an image that everybody reads; None where nothing is known."""
    if not os.path.isfile(path):
        return 'is a folder' if os.path.isdir(path) else None
    if os.path.getsize(path) == 0:
        return 'is empty'
    with open(path, 'rb') as file:
        start = file.read(16)
    if start.isascii() and start.strip()[:1] in (b'<', b'{', b'v'):  # a page, JSON, Git LFS
        return f'is text that begins with {start.decode().strip()!r}'
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            kind = f'{image.format} image of mode {image.mode}'
            image.load()
    except UnidentifiedImageError:
        if not start.startswith(TIFF):
            return None
        return (
            'is a TIFF which this pipeline does not read (other channels than 1, 3 or 4, or other '
            "numbers): imdecode_backend='tifffile' reads it, with the package tifffile, and "
            "color_type='unchanged'; else"
        )
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        return f'is damaged ({error})'
    return f'is a {kind}, which this pipeline does not read'


def _wrong_object(data: dict[str, Any]) -> str | None:
    """The first object of an image whose mask MMDetection does not read."""
    size = data.get('ori_shape') or (data.get('height'), data.get('width'))
    for number, instance in enumerate(data.get('instances') or []):
        wrong = wrong_mask(instance.get('mask'), list(size))
        if wrong:
            return (
                f'object {number} of it, at bbox {instance.get("bbox")}: its segmentation {wrong}\n'
                f'  write {EXPECTED}'
            )
    return None
