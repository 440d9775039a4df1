"""Reading a config file and checking what it needs, before anything expensive starts."""

import json
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config, ConfigDict

from wsbcn_mm.openmmlab import checkpoints as checkpoint
from wsbcn_mm.openmmlab import compat
from wsbcn_mm.openmmlab.files import damage, latest_complete
from wsbcn_mm.openmmlab.registry import ATOMIC_CHECKPOINT_HOOK, ESTIMATES_HOOK, NORM_NAMED

PACKAGE_OF_SCOPE = {'mmdet': 'mmdet', 'mmseg': 'mmseg', 'mmpretrain': 'mmpretrain'}
PRETRAINED = ('Pretrained', 'PretrainedInit')  # the initialisation from a file

COCO_LAYOUT = """\
  expected layout (`ln -s /path/to/coco data/coco` puts it there):
    data/coco/annotations/instances_{train,val}2017.json
    data/coco/{train,val}2017/*.jpg"""
VOC_LAYOUT = """\
  expected layout (`ln -s /path/to/VOCdevkit data/VOCdevkit` puts it there):
    data/VOCdevkit/VOC2012/ImageSets/Segmentation/{train,val}.txt
    data/VOCdevkit/VOC2012/{JPEGImages/*.jpg,SegmentationClass/*.png}
  configs of VOC aug also need ImageSets/Segmentation/aug.txt and SegmentationClassAug/*.png, which
  mmsegmentation's tools/dataset_converters/voc_aug.py makes from the SBD download"""


def load_config(path: str, options: dict | None = None) -> Config:
    """Reads a config file, applies ``--cfg-options`` and checks that its packages are there.

    Args:
        path: A config file.
        options: Overrides, ``{'a.b.c': value}``.

    Raises:
        FileNotFoundError: no such file; the message names files with a similar name.
        ImportError: the config's scope needs a package that is missing or too old.
        ValueError: it is not a model's config.
    """
    path, _ = find_config(path)
    compat.require('mmengine', 'mmcv')
    cfg = read_config(path)
    if options:
        cfg.merge_from_dict(options)
    package = PACKAGE_OF_SCOPE.get(cfg.get('default_scope'))
    if package is not None:
        compat.require(package)
    if not isinstance(cfg.get('model'), dict):
        raise ValueError(
            f'{path} has no model: no top-level `model = dict(type=...)`\n'
            '  is it a file of _base_ parts, or of a dataset?'
        )
    return cfg


def read_config(path: str | Path) -> Config:
    """Reads a config file, which is a program and may raise anything.

    Raises:
        ImportError: one of its ``custom_imports`` or bases needs a package that is missing.
        FileNotFoundError: one that it inherits from is missing.
        ValueError: the file, or one that it inherits from, cannot be read as a config.
    """
    try:
        return with_names(Config.fromfile(path))
    except (ImportError, FileNotFoundError):  # say all there is to say
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [''])[0]
        raise ValueError(
            f'{path} cannot be read as a config\n  {type(error).__name__}: {first}'
        ) from error


def with_names(cfg: Config) -> Config:
    """A config in pure Python holds classes; the same with their names (``mmdet.models.FPN``)."""
    # What else tells them apart is the file; a config of the other kind imports nothing.
    return Config(cfg.to_dict(), filename=cfg.filename) if cfg._imported_names else cfg


def type_name(cfg: dict) -> str:
    """The ``type`` of a config without the package in front of it; classes count by their name."""
    kind = cfg.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def find_config(source: str) -> tuple[Path, str | None]:
    """The file of a config that is given by path or by name.

    Args:
        source: A path, or ``'mmdet::...'``, ``'mmseg::...'``, ``'wsbcn_mm::...'`` with the path
            below the package's configs; ``.py`` may be missing.

    Returns:
        The file, and the name by which another config inherits from it; None for a plain path, and
        for the names that mmengine does not read (those with a ``+``).

    Raises:
        FileNotFoundError: no such file; the message names similar ones.
        ImportError: the package is not installed.
    """
    package, separator, name = source.partition('::')
    if not separator:
        if not Path(source).is_file():
            # Same folder first, then the repository's, then the package's.
            ours = Path(__file__).resolve().parents[1] / '.mim' / 'configs'
            near = compat.near_names(source, ours, Path('configs'), Path(source).parent)
            raise FileNotFoundError(f'no config file {source}{near}')
        return Path(source), None
    known = (*PACKAGE_OF_SCOPE, 'wsbcn_mm')
    if package not in known:
        raise ValueError(
            f'{source!r} names no known package\n  expected '
            + ', '.join(f'{name}::...' for name in known)
        )
    if package in compat.PACKAGES:
        compat.require(package)
    name = name if name.endswith('.py') else f'{name}.py'
    folder = package_configs(package)
    if not (folder / name).is_file():
        near = compat.near_names(name, folder).replace(f'{folder}/', f'{package}::')
        raise FileNotFoundError(f'{package} has no config {name}{near}')
    return folder / name, None if '+' in name else f'{package}::{name}'


def package_configs(package: str) -> Path:
    """The folder of the configs that an installed package ships."""
    return Path(find_spec(package).submodule_search_locations[0]) / '.mim' / 'configs'


def check_data(cfg: Config, *loaders: str) -> None:
    """Raises unless the files that the datasets of these loaders name exist.

    Args:
        cfg: The config.
        *loaders: Names such as ``'train_dataloader'``; one that the config lacks is passed over.

    Raises:
        FileNotFoundError: the first annotation file or image folder that is missing, with the
            layout that is expected.
    """
    for loader in loaders:
        for dataset in _datasets((cfg.get(loader) or {}).get('dataset')):
            if dataset['type'].startswith('Shapes'):
                continue  # draws itself
            root = Path(dataset.get('data_root') or '')
            prefixes = (dataset.get('data_prefix') or {}).values()
            wanted = [dataset.get('ann_file') or '', *prefixes]
            for path in (root / name for name in wanted if name):
                if not path.exists():
                    raise FileNotFoundError(
                        f'{loader}: {dataset["type"]} needs {path}, which does not exist\n'
                        f'{VOC_LAYOUT if "VOC" in dataset["type"] else COCO_LAYOUT}\n'
                        f'  or name another place: --cfg-options {loader}.dataset.data_root=...'
                    )


def _datasets(cfg: dict | None) -> list[dict]:
    """The innermost dataset configs below the wrappers (Repeat, Concat, MultiImageMix)."""
    if cfg is None:
        return []
    if 'datasets' in cfg:
        return [inner for part in cfg['datasets'] for inner in _datasets(part)]
    return _datasets(cfg['dataset']) if 'dataset' in cfg else [cfg]


def check_checkpoint_file(path: str) -> None:
    """Raises unless a checkpoint is there and can be read; addresses are left to mmengine.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, or no checkpoint.
    """
    if '://' in path:
        return
    # The checksums of all parts; what reads the file next looks at its structure alone.
    reason = damage(path) if Path(path).is_file() else None
    if reason is not None:
        raise ValueError(f'the checkpoint {path} {reason}')
    checkpoint.read_checkpoint(path)


def check_pretrained(cfg: Config) -> None:
    """Raises unless every local file that a part of the model starts from is there and readable.

    Args:
        cfg: The config.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get one, or to do without.
        ValueError: a file cannot be read.
    """
    for place, init in _pretrained(cfg.get('model') or {}, 'model'):
        path = init.get('checkpoint') or ''
        if '://' in path:
            continue
        if not Path(path).is_file():
            raise FileNotFoundError(
                f'{place} starts from {path}, which does not exist\n'
                '  convert a published checkpoint: tools/model_converters/convert_checkpoint.py; '
                'the comments of configs/_base_/backbones hold the commands\n'
                f'  or name another file: --cfg-options {place}.init_cfg.checkpoint=...\n'
                f'  or load none, where the whole model comes from elsewhere: {place}.init_cfg=None'
            )
        checkpoint.read_checkpoint(path)


def _pretrained(part: dict | list, place: str):
    """Where a model's config says ``init_cfg=dict(type='Pretrained')``, and that dict."""
    if isinstance(part, dict):
        init = part.get('init_cfg')
        for cfg in init if isinstance(init, list) else [init]:
            if isinstance(cfg, dict) and type_name(cfg) in PRETRAINED:
                yield place, cfg
        items = part.items()
    else:
        items = enumerate(part)
    for key, value in items:
        if isinstance(value, (dict, list)) and key != 'init_cfg':
            yield from _pretrained(value, f'{place}.{key}')


def harden(cfg: Config) -> None:
    """Adds what training with BCN needs and the config does not have.

    `EstimatesHook` where the model has BCN, and the atomic checkpoint hook in the place of
    mmengine's own; hooks of other types are left alone.

    Args:
        cfg: Changed in place.
    """
    present = any(type_name(hook) == ESTIMATES_HOOK for hook in cfg.get('custom_hooks') or [])
    if not present and _has_bcn(cfg.get('model')):
        add_hook(cfg, dict(type=ESTIMATES_HOOK))
    hooks = cfg.setdefault('default_hooks', {})
    checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if type_name(checkpoint) == 'CheckpointHook':
        checkpoint['type'] = ATOMIC_CHECKPOINT_HOOK


def _has_bcn(part: object) -> bool:
    """Whether a part of a model's config names one of our norms."""
    if isinstance(part, dict):
        return type_name(part) in NORM_NAMED or any(_has_bcn(value) for value in part.values())
    return isinstance(part, (list, tuple)) and any(_has_bcn(value) for value in part)


def resume_from(cfg: Config, checkpoint: str) -> list[str]:
    """Sets what to resume from.

    Args:
        cfg: Changed in place; with ``work_dir``.
        checkpoint: A file, or ``'auto'``: the latest complete one of the work dir; where there is
            none, training starts anew.

    Returns:
        A line for each checkpoint that was passed over because it is not complete.

    Raises:
        ValueError: the file is not complete.
        FileNotFoundError: there is no such file.
    """
    passed_over = []
    if checkpoint == 'auto':
        found, passed_over = latest_complete(cfg.work_dir)
        checkpoint = None if found is None else str(found)
    else:
        check_checkpoint_file(checkpoint)
    cfg.resume, cfg.load_from = checkpoint is not None, checkpoint
    return passed_over


def damaged_annotations(cfg: Config, *loaders: str) -> list[str]:
    """A line for each JSON annotation file of these loaders that cannot be parsed.

    Reads them all: for the time after something has failed.
    """
    lines = []
    for loader in loaders:
        for dataset in _datasets((cfg.get(loader) or {}).get('dataset')):
            path = Path(dataset.get('data_root') or '', dataset.get('ann_file') or '')
            if path.suffix == '.json' and path.is_file():
                try:
                    content = json.loads(path.read_bytes())
                    if not isinstance(content, dict):
                        raise ValueError(f'a {type(content).__name__} instead of an object')
                except ValueError as error:
                    lines.append(f'{loader}: {path} is damaged: {error}')
    return list(dict.fromkeys(lines))


def work_dir(cfg: Config, config_path: str, argument: str | None) -> str:
    """The folder of a run: the argument, else the config's, else work_dirs/<name of config>."""
    return argument or cfg.get('work_dir') or f'./work_dirs/{Path(config_path).stem}'


def add_hook(cfg: Config, hook: dict) -> None:
    """Appends a hook of ours to the config's custom hooks."""
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]


def draw_pictures(cfg: Config, show: bool, show_dir: str | None, wait_time: float) -> None:
    """Turns on the visualization hook of detection or segmentation.

    Raises:
        ValueError: the config has no such hook.
    """
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    if hook is None:
        raise ValueError(
            '--show and --show-dir need default_hooks.visualization in the config, such as '
            "dict(type='DetVisualizationHook') or dict(type='SegVisualizationHook')"
        )
    hook['draw'] = True
    if show:
        hook['show'], hook['wait_time'] = True, wait_time
    if show_dir:
        if 'Det' in hook['type']:
            hook['test_out_dir'] = show_dir
        else:
            cfg.visualizer['save_dir'] = str(Path(cfg.work_dir) / show_dir)


def augment_test(cfg: Config) -> None:
    """Replaces model and test pipeline by those of test-time augmentation (--tta).

    Raises:
        ValueError: the config lacks ``tta_model`` or ``tta_pipeline``.
    """
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise ValueError(
            '--tta needs tta_model and tta_pipeline in the config; those of '
            "'mmdet::_base_/... _tta.py' and mmseg's dataset bases are examples"
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    dataset.pipeline = cfg.tta_pipeline


def keep_predictions(cfg: Config, out: str) -> None:
    """Makes the evaluator keep what the model predicts (--out).

    Args:
        cfg: Changed in place.
        out: Segmentation: a folder of masks. Otherwise: a .pkl file.

    Raises:
        ValueError: not a .pkl file where one is expected.
    """
    if cfg.get('default_scope') == 'mmseg':
        cfg.test_evaluator['output_dir'] = out
        cfg.test_evaluator['keep_results'] = True
        return
    if not out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must name a .pkl file for detection\n  got {out}')
    evaluators = cfg.test_evaluator
    dump = dict(type='DumpDetResults', out_file_path=out)
    cfg.test_evaluator = [*(evaluators if isinstance(evaluators, list) else [evaluators]), dump]
