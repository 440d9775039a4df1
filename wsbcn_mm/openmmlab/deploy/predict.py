"""From files of images or videos to predictions in files, one after the other."""

import copy
import inspect
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine import fileio
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose, pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import VISUALIZERS
from PIL import Image, ImageColor

from wsbcn_mm.openmmlab.checkpoints import BY_LABEL
from wsbcn_mm.openmmlab.config import scope_of, type_name, use_scope
from wsbcn_mm.openmmlab.data.reading import DataError, is_left_behind, is_there
from wsbcn_mm.openmmlab.deploy import clips, labels
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.loaders import dataset_class, datasets_of, datasets_of_test

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


def classes_of(cfg: Config, model: Any, required: bool = True) -> dict[str, Any]:
    """Names and colours of the classes: the checkpoint's, else those of the config's dataset.

    Where they are not ``required`` and nobody knows them, ``classes`` is None.

    The names are in the order of the labels. In COCO's layout that is the order of the annotation
    file that was trained on, whatever that of the names in the config is: checkpoints of ours hold
    it, and of others the file that is tested on is asked.
    """
    meta = getattr(model, 'dataset_meta', None)
    # The names need no pipeline.
    datasets = datasets_of(cfg, 'test_dataloader') or datasets_of(cfg, 'val_dataloader')
    dataset = datasets[0][1] if datasets else {}
    kind = dataset_class(cfg, dataset)
    if not meta or 'classes' not in meta:
        # Which also reads the names from a file, where a config names one.
        own = BaseDataset._load_metainfo(dataset.get('metainfo'))
        meta = _meta_of(getattr(kind, 'METAINFO', {}), own)
    if not meta.get('classes') and not required:
        return {**meta, 'classes': None}
    if 'classes' not in meta:
        raise ValueError(
            "neither the checkpoint nor the config's dataset knows the names of the classes\n"
            '  set test_dataloader.dataset.metainfo=dict(classes=...)'
        )
    if isinstance(meta['classes'], str):
        raise ValueError(
            f'metainfo.classes is one text, and no file: {meta["classes"]!r}\n  write a tuple of '
            'names, with a comma behind a single one'
        )
    names = list(meta['classes'])
    file = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    arguments = dataset.get('backend_args')
    known = BY_LABEL in meta or os.path.isdir(file) or not file
    if not known and _numbers_labels_by_file(cfg, kind) and is_there(file, arguments):
        names = _names_by_file(file, names, arguments)
    return {**meta, 'classes': names}


def _meta_of(official: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What a dataset's class says, and its config instead; each class keeps its colour."""
    meta = {**official, **own}
    classes, palette = meta.get('classes') or (), meta.get('palette') or ()
    if palette and len(palette) != len(classes):
        colour = dict(zip(official.get('classes', ()), official.get('palette', ())))
        known = all(name in colour for name in classes)
        meta['palette'] = [colour[name] for name in classes] if known else None
    return meta


def _numbers_labels_by_file(cfg: Config, kind: type | None) -> bool:
    if scope_of(cfg) != 'mmdet':
        return False
    from mmdet.datasets import CocoDataset

    return getattr(kind, 'load_data_list', None) is CocoDataset.load_data_list


def _names_by_file(file: str, names: list[str], backend_args: dict[str, Any] | None) -> list[str]:
    try:
        return [c['name'] for c in categories_of(file, names, backend_args)] or names
    except Exception as error:  # of a storage, which may raise anything
        if os.path.exists(file):
            raise
        print_log(
            f'{file}, whose order of categories numbers the labels, cannot be read '
            f'({first_line(error)}): the names are taken in the order of the config',
            'current',
            logging.WARNING,
        )
        return names


def categories_of(
    annotations: str, names: list[str], backend_args: dict[str, Any] | None = None
) -> list[dict[str, Any]]:
    """The categories of a COCO file that have these names, in its order."""
    content = json.loads(fileio.get_text(annotations, backend_args=backend_args))
    return [c for c in content.get('categories', []) if c.get('name') in names]


class Predictor:
    """A model with what is needed before and after it.

    Args:
        cfg: The config.
        model: In evaluation mode, folded or not.
    """

    def __init__(self, cfg: Config, model: Any) -> None:
        self.model = model
        self.gives_labels = scope_of(cfg) in labels.SCOPES
        self.meta = classes_of(cfg, model, required=not self.gives_labels)
        self._read = Reader(cfg)
        if self.gives_labels:
            return
        scope = scope_of(cfg)
        kind = 'mmdet.DetLocalVisualizer' if scope == 'mmdet' else 'mmseg.SegLocalVisualizer'
        if scope == 'mmseg' and not self.meta.get('palette'):
            self.meta['palette'] = _colours(len(self.meta['classes']))
        if isinstance(self.meta.get('palette'), (list, tuple)):
            self.meta['palette'] = [
                ImageColor.getrgb(colour) if isinstance(colour, str) else colour
                for colour in self.meta['palette']
            ]
        look = {k: v for k, v in (cfg.get('visualizer') or {}).items() if k == 'alpha'}
        self._visualizer = VISUALIZERS.build(
            dict(type=kind, name='wsbcn_mm_infer', vis_backends=None, **look)
        )
        palette = self.meta.get('palette') or 'random'
        self._visualizer.dataset_meta = {**self.meta, 'palette': palette}

    @torch.no_grad()
    def __call__(self, path: str | Path) -> tuple[np.ndarray, Any]:
        """An image file as it was loaded, and its data sample: predictions in its pixels.

        Raises:
            DataError: this is no readable image.
            ValueError: the model predicts what cannot be written here.
        """
        image, batch = self._read(path)
        sample = self.model.test_step(batch)[0].cpu()
        if not any(name in sample for name in ('pred_instances', 'pred_sem_seg', 'pred_score')):
            found = [name for name, _ in sample.items() if name.startswith('pred_')]
            raise ValueError(
                f'the model predicts {", ".join(found) or "nothing"}, and boxes, masks, '
                'class maps and scores of classes are what is written here\n  panoptic results: '
                'tools/test.py with --cfg-options test_evaluator.outfile_prefix=DIR/panoptic '
                "writes COCO's format"
            )
        if 'labels' in sample.get('pred_instances', ()):  # CrowdDet gives numbers with a point
            sample.pred_instances.labels = sample.pred_instances.labels.long()
        return image, sample

    def draw(self, image: np.ndarray, sample: Any, path: Path, threshold: float) -> None:
        """A picture of the predictions on the image as it was loaded."""
        if self.gives_labels:
            frames = image if image.ndim == 4 else displayable(image)[None]
            found = labels.best(sample, self.meta['classes'], 3)
            labels.draw(frames, [f'{e["class"]}  {e["score"]:.2f}' for e in found], path)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = dict(pred_score_thr=threshold) if 'pred_instances' in sample else {}
        self._visualizer.add_datasample(
            path.name,
            displayable(image),
            sample,
            draw_gt=False,
            out_file=str(path),
            **scores,
        )


def _colours(number: int) -> list[list[int]]:
    """Those that mmsegmentation's data sets give to classes without any."""
    return np.random.RandomState(42).randint(0, 255, size=(number, 3)).tolist()


def displayable(image: np.ndarray) -> np.ndarray:
    """Any loaded image (H, W) or (H, W, C) as 8-bit RGB; more than 8 bits by the largest value."""
    image = image[..., None] if image.ndim == 2 else image
    if image.dtype != np.uint8:
        values = np.nan_to_num(image.astype(np.float64)).clip(0)
        image = (values * (255 / max(values.max(initial=0), 255))).astype(np.uint8)
    image = image[..., [2, 1, 0]] if image.shape[2] >= 3 else image[..., [0, 0, 0]]
    return np.ascontiguousarray(image)


class CocoWriter:
    """Predictions as a COCO file: images, categories, annotations with scores; masks as RLE.

    Written as it goes: memory does not grow with the number of images. The file appears when all
    is there.

    Args:
        path: The JSON file.
        classes: Names in the order of the labels; category ids are 1, 2, ... in this order.
        annotations: A COCO annotation file whose ids of images (by file name) and categories (by
            name) are taken instead, so that the predictions can be evaluated against it.
    """

    def __init__(self, path: Path, classes: list[str], annotations: Path | None = None) -> None:
        self.images: list[dict[str, Any]] = []
        self.categories = [dict(id=i + 1, name=name) for i, name in enumerate(classes)]
        self._image_ids: dict[str, int] | None = None
        if annotations is not None:
            given = _read_annotations(annotations)
            self._image_ids = {_file_of(image): image['id'] for image in given['images']}
            ids = {c['name']: c['id'] for c in given['categories']}
            unknown = [name for name in classes if name not in ids]
            if unknown:
                raise ValueError(f'{annotations} has no category {", ".join(unknown)}')
            self.categories = [dict(id=ids[name], name=name) for name in classes]
        self._path = path
        self._part = path.with_name(f'.{path.name}.part')
        self._file = self._part.open('w')
        self._file.write('{"annotations": [')
        self._count = 0

    def add(self, name: str, sample: Any, size: tuple[int, int]) -> None:
        """The predictions of one image, of (height, width) in pixels."""
        from pycocotools import mask as rle

        image_id = len(self.images) + 1
        if self._image_ids is not None:
            image_id = _id_of(name, self._image_ids)
        self.images.append(dict(id=image_id, file_name=name, height=size[0], width=size[1]))
        found = sample.pred_instances
        if len(found) and int(found.labels.max()) >= len(self.categories):
            raise ValueError(
                f'the model predicts class number {int(found.labels.max())}, and '
                f'{len(self.categories)} names of classes are known\n'
                '  name all of them: --cfg-options test_dataloader.dataset.metainfo.classes=...'
            )
        masks = np.asarray(found.masks, dtype=np.uint8) if 'masks' in found else None
        for i, (box, score, label) in enumerate(
            zip(found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist())
        ):
            x1, y1, x2, y2 = box
            entry = dict(
                id=self._count + 1,
                image_id=image_id,
                category_id=self.categories[label]['id'],
                bbox=[x1, y1, x2 - x1, y2 - y1],  # not rounded: as test.py evaluates them
                score=score,
                area=(x2 - x1) * (y2 - y1),
                iscrowd=0,
            )
            if masks is not None:
                code = rle.encode(np.asfortranarray(masks[i]))
                entry['area'] = float(rle.area(code))
                size_ = [int(v) for v in code['size']]
                entry['segmentation'] = dict(size=size_, counts=code['counts'].decode())
            self._file.write((',\n' if self._count else '\n') + json.dumps(entry))
            self._count += 1

    def close(self, complete: bool = True) -> None:
        """Finishes the file; removes it where the run was not completed."""
        self._file.write('\n], "images": ' + json.dumps(self.images))
        self._file.write(', "categories": ' + json.dumps(self.categories) + '}\n')
        self._file.close()
        if complete:
            os.replace(self._part, self._path)
        else:
            self._part.unlink()


def _read_annotations(path: Path) -> dict[str, Any]:
    """An annotation file in COCO's format.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is another one.
    """
    if not path.is_file():
        raise FileNotFoundError(f'--annotations: no file {path}')
    try:
        content = json.loads(path.read_bytes())
        if {'images', 'categories'} <= content.keys():
            return content
    except (ValueError, AttributeError):  # no JSON, or a list
        pass
    raise ValueError(
        f"--annotations: {path} is not in COCO's format: JSON of images and categories"
    )


def _file_of(image: dict[str, Any]) -> str:
    """The file of an image of an annotation file; LVIS 1 has addresses alone."""
    address = str(image.get('coco_url') or '').partition('://')[2].partition('/')[2]
    return image.get('file_name') or address


def _id_of(name: str, ids: dict[str, int]) -> int:
    """The id of a file, which the annotations may name with folders, or as LVIS 0.5 does.

    Raises:
        ValueError: there is none, or several.
    """
    if name in ids:
        return ids[name]
    found = [file for file in ids if file.endswith((f'/{name}', f'_{name}'))]
    found = [f for f in found if f[-len(name) - 1] == '/' or f.startswith('COCO_')]
    if len(found) != 1:
        there = ', '.join(found[:3] or list(ids)[:3])
        raise ValueError(
            f'{name} is {"several" if found else "not among the"} images of the annotation file\n'
            f'  it has {there}, ...: give infer.py the folder below which they have these names'
        )
    return ids[found[0]]


def write_mask(path: Path, sample: Any, palette: Any) -> None:
    """Class numbers as a PNG with a palette; 16 bit grey where there are more than 256 classes.

    The numbers are those of the data set: with ``reduce_zero_label`` 0 is "no class" there, and the
    first class is 1, as mmsegmentation's metric writes them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    classes = sample.pred_sem_seg.data.squeeze(0).numpy()
    colours = list(palette) if isinstance(palette, (list, tuple)) else []
    if sample.metainfo.get('reduce_zero_label', False):
        classes, colours = classes + 1, [(0, 0, 0), *colours] if colours else []
    if classes.max(initial=0) > 255:
        Image.fromarray(classes.astype(np.uint16)).save(path)
        return
    picture = Image.fromarray(classes.astype(np.uint8))
    if colours:
        picture.putpalette([int(v) for colour in colours[:256] for v in colour])
    picture.save(path)
