"""Files of images or videos: found, and read as the config's test data are read."""

import copy
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate

from wsbcn_mm.openmmlab.config import scope_of, type_name, use_scope
from wsbcn_mm.openmmlab.data.reading import DataError, is_left_behind
from wsbcn_mm.openmmlab.deploy import clips
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.loaders import dataset_class, datasets_of_test

JPEG = ('.jpg', '.jpeg', '.jpe', '.jfif', '.jp2')
SUFFIXES = (*JPEG, '.png', '.bmp', '.ppm', '.pgm', '.tif', '.tiff', '.webp', '.gif')


def find_images(
    source: Path, output: Path, suffixes: tuple[str, ...] = SUFFIXES
) -> list[tuple[Path, Path]]:
    """Image files below a folder, or one file, each with its path relative to the folder.

    What systems and editors leave behind there (``.ipynb_checkpoints``, ``._a.png``) is none.

    Args:
        source: The folder, or the file.
        output: What lies below it are results of ours.
        suffixes: What an image's name ends with, in small letters.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: two files whose results would have one name.
    """
    if source.is_file():
        return [(source, Path(source.name))]
    if not source.is_dir():
        raise FileNotFoundError(f'no image file or folder {source}')
    files = [
        file
        for file in sorted(source.rglob('*'))
        if file.name.lower().endswith(suffixes)
        and file.is_file()
        and not is_left_behind(str(file.relative_to(source)))
        and output.resolve() not in file.resolve().parents
    ]
    if not files:
        what = 'video' if suffixes == clips.SUFFIXES else 'image'
        raise FileNotFoundError(f'no {what} in {source} ({", ".join(suffixes)})')
    seen: dict[Path, Path] = {}
    for file in files:
        other = seen.setdefault(file.with_suffix(''), file)
        if other is not file:
            raise ValueError(f'{other} and {file} would write the same results: rename one')
    return [(file, file.relative_to(source)) for file in files]


def suffixes_of(cfg: Config) -> tuple[str, ...]:
    """What names of images (of MMAction2: videos) end with; the config's test data may say more."""
    datasets = datasets_of_test(cfg)
    if any(type_name(step).endswith('Decode') for step in datasets[0]['pipeline']):
        return clips.SUFFIXES
    own = (dataset.get('img_suffix') for dataset in datasets)
    return tuple(dict.fromkeys((*SUFFIXES, *(s.lower() for s in own if s))))


class Reader:
    """Reads files as the config's test data are read: by its own test pipeline.

    What loads ground truth is left out of it. Everything else stays as the config says it: how many
    channels and bits, whether EXIF counts, sizes, normalisation.

    Args:
        cfg: The config; see `use_scope`.

    Raises:
        ValueError: no test data, parts of it that are read in different ways, or a pipeline that
            does not begin with a file.
    """

    def __init__(self, cfg: Config) -> None:
        use_scope(cfg)
        datasets = datasets_of_test(cfg)
        self.dataset = datasets[0]
        if any(other['pipeline'] != self.dataset['pipeline'] for other in datasets):
            raise ValueError(
                'the test data are read in different ways: their parts have pipelines of their own'
                '\n  name one of them: --cfg-options test_dataloader.dataset=...'
            )
        self._clips = scope_of(cfg) == 'mmaction'
        if self._clips:
            load, prepare = clips.reading_steps(self.dataset['pipeline'])
            self._load, self._prepare = Compose(load), Compose(prepare)
            return
        steps = [copy.deepcopy(s) for s in self.dataset['pipeline'] if not _loads_truth(s)]
        if not steps or 'Load' not in type_name(steps[0]) or 'Array' in type_name(steps[0]):
            found = type_name(steps[0]) if steps else 'nothing'
            raise ValueError(f'the test pipeline must begin with LoadImageFromFile\n  got {found}')
        steps[0].pop('backend_args', None)  # these images are local files
        self._load, self._prepare = Compose(steps[:1]), Compose(steps[1:])
        self._info: dict[str, Any] = dict(
            img_id=0, seg_map_path=None, label_map=None, seg_fields=[], instances=[]
        )
        self._info['reduce_zero_label'] = reduces_zero_label(cfg, self.dataset)

    def __call__(self, path: str | Path) -> tuple[np.ndarray, dict[str, Any]]:
        """The image as it was loaded, and what a data loader makes of it.

        Of a video the frames that were sampled, (T, H, W, 3) in RGB.

        Raises:
            DataError: this is no readable image or video.
            ValueError: the pipeline does not take it.
        """
        if self._clips:
            data = self._load(clips.info_of(path))
            frames = np.stack(data['imgs'])
            return frames, pseudo_collate([self._prepare(data)])
        data = self._load({**copy.deepcopy(self._info), 'img_path': str(path)})
        if data is None:  # ignore_empty
            raise DataError(f'{path} is empty')
        image = data['img']
        try:
            return image, pseudo_collate([self._prepare(data)])
        except DataError as error:  # not the file's fault
            raise ValueError(
                f'the test pipeline fails on {path}, an image {image.shape} of {image.dtype}\n'
                f'  {first_line(error.__cause__ or error)}'
            ) from error


def _loads_truth(step: dict[str, Any]) -> bool:
    name = type_name(step)
    return name.startswith('Load') and ('Annotation' in name or 'Proposals' in name)


def reduces_zero_label(cfg: Config, dataset: dict[str, Any]) -> bool:
    """Whether label 0 of a dataset means "no class": as its config says, or its class."""
    if 'reduce_zero_label' in dataset:
        return bool(dataset['reduce_zero_label'])
    kind = dataset_class(cfg, dataset)
    for base in kind.__mro__ if kind is not None else ():
        if '__init__' in vars(base):
            argument = inspect.signature(vars(base)['__init__']).parameters.get('reduce_zero_label')
            if argument is not None:
                return bool(argument.default)
    return False
