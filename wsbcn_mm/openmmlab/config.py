"""Configs: found, read, and the host that they are for."""

import ast
import copy
import os
import re
import sys
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mmengine import registry as registries
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.utils import get_object_from_string

from wsbcn_mm.openmmlab import compat
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.options import merge, unread, without_effect

# Detection, segmentation, classification of images, of videos: a config's scope is a package.
HOSTS = ('mmdet', 'mmseg', 'mmpretrain', 'mmaction')
KNOWN = (*HOSTS, 'wsbcn_mm')  # in front of `::`
PRETRAINED = ('Pretrained', 'PretrainedInit')  # the initialisation from a file
WEIGHTS = ('.pth', '.pt', '.tar', '.ckpt', '.safetensors', '.onnx')
TRACKER = 'BaseMOTModel'  # the base of MMDetection's trackers and video instance segmentation
# Fields of a config for MMCV 1, and what MMEngine has in their place.
FORMER = ('data', 'optimizer', 'optimizer_config', 'lr_config', 'runner', 'checkpoint_config')
TODAY = ('default_scope', 'train_dataloader', 'test_dataloader', 'optim_wrapper')


class NoModel(ValueError):
    """The config has no model: a file of parts, or of a dataset."""


def no_model(name: str) -> NoModel:
    """The error about a config of this name."""
    return NoModel(
        f'{name} has no model: no top-level `model = dict(type=...)`\n'
        '  is it a file of _base_ parts, or of a dataset?'
    )


def load_config(path: str, options: dict | None = None) -> Config:
    """Reads a config file, applies ``--cfg-options`` and checks that its packages are there.

    Args:
        path: A config file.
        options: Overrides, ``{'a.b.c': value}``.

    Raises:
        FileNotFoundError: no such file; the message names files with a similar name.
        ImportError: the config's scope needs a package that is missing or too old.
        ValueError: it is not a model's config, or has no place for an override.
    """
    file, _ = find_config(path)
    compat.require('mmengine', 'mmcv')
    cfg = read_config(file)
    lines = [f'{path}: {line}' for line in _without_effect(cfg, file)]
    if options:
        lines += unread(cfg, options)
        merge(cfg, options)
    for line in lines if os.environ.get('RANK', '0') == '0' else ():
        print(f'warning: {line}', file=sys.stderr)
    if cfg.get('default_scope') in HOSTS:
        compat.require(cfg.default_scope)
    _check_age(cfg, path)
    if not isinstance(cfg.get('model'), dict):
        raise no_model(path)
    return cfg


def _without_effect(cfg: Config, file: Path) -> list[str]:
    """Variables of its bases that a file sets in vain; nothing where the bases are computed."""
    text = file.read_text('utf-8') if file.suffix == '.py' else ''
    inherited: dict[str, Any] = {}
    for base in _bases_of(text, file):
        if not base.is_file():  # mmengine knows more names
            return []
        inherited.update(with_names(Config.fromfile(base))._cfg_dict)
    if not inherited:
        return []
    return without_effect(cfg, Config(inherited), text)


def _bases_of(text: str, file: Path) -> list[Path]:
    """The files that a config inherits from; none where they are computed."""
    stated = re.search(r'^_base_\s*=\s*(\[[^]]*\]|\([^)]*\)|[\'"][^\'"]*[\'"])', text, re.MULTILINE)
    if stated is None:
        return _imported_bases(text, file)
    try:
        names = ast.literal_eval(stated[1])
    except ValueError:
        return []
    found = []
    for name in [names] if isinstance(names, str) else names:
        package = name.partition('::')[0]
        named = '::' in name and package in KNOWN
        found.append(find_config(name)[0] if named else file.parent / name)
    return found


def _imported_bases(text: str, file: Path) -> list[Path]:
    """The same of a config in pure Python: what stands in ``with read_base():``."""
    try:
        blocks = [part for part in ast.parse(text).body if isinstance(part, ast.With)]
    except SyntaxError:  # a template of mmengine
        return []
    found = []
    for node in [node for block in blocks for node in block.body]:  # mmengine allows no other
        if isinstance(node, ast.ImportFrom) and node.module:
            first, *rest = node.module.split('.')
            above = [file.parent, *['..'] * (node.level - 1), first]
            start = above if node.level else [compat.package_folder(first)]
            found.append(Path(*start, *rest).with_suffix('.py'))
    return found


def _check_age(cfg: Config, path: str) -> None:
    """A config of the hosts' former major versions has other fields, and nothing of it is found."""
    old = [key for key in FORMER if isinstance(cfg.get(key), dict)]
    if len(old) < 2 or any(key in cfg for key in TODAY):
        return
    raise ValueError(
        f'{path} is written for MMDetection 2, MMSegmentation 0 or another host of that age (MMCV '
        f'1): it has {", ".join(old)}, and none of {", ".join(TODAY)}\n  the documentation of '
        'MMDetection 3, MMSegmentation 1, MMPretrain and MMAction2 says under "Migration" what '
        'each field has become'
    )


def read_config(path: str | Path) -> Config:
    """Reads a config file, which is a program and may raise anything.

    Raises:
        ImportError: one of its ``custom_imports`` or bases needs a package that is missing.
        FileNotFoundError: one that it inherits from is missing.
        ValueError: the file, or one that it inherits from, cannot be read as a config.
    """
    try:
        return with_names(Config.fromfile(path))
    except ImportError as error:
        first: BaseException = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__  # type: ignore[assignment]
        raise ImportError(
            f'{path} imports what cannot be imported\n  {type(first).__name__}: '
            f'{first_line(first)}\n  modules of your own are found below the folders of PYTHONPATH'
        ) from error
    except FileNotFoundError as error:
        if error.filename is None:
            raise
        raise FileNotFoundError(
            f'{path} inherits (_base_) from {error.filename}, which does not exist'
        ) from error
    except Exception as error:
        raise ValueError(
            f'{path} cannot be read as a config{_line_of(error)}\n  {type(error).__name__}: '
            f'{first_line(error)}'
        ) from error


def _line_of(error: BaseException) -> str:
    """The line of a config that stopped it; nothing where the error names it, or is mmengine's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if frame.name != '<module>':
        return ''
    return f': it stops at line {frame.lineno} of {frame.filename}: {frame.line}'


def dicts_in(value: object) -> Iterator[dict]:
    """Every dict in a part of a config, outer ones first."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from dicts_in(item)


def with_names(cfg: Config) -> Config:
    """A config in pure Python holds classes; the same with their names (``mmdet.models.FPN``)."""
    # What else tells them apart is the file; a config of the other kind imports nothing.
    if not cfg._imported_names:
        return cfg
    content = cfg.to_dict()
    for part in dicts_in(content):
        if isinstance(part.get('type'), str):
            part['type'] = _findable(part['type'])
    return Config(content, filename=cfg.filename)


def _findable(name: str) -> str:
    """A name by which the hosts find what a config in pure Python holds.

    Operators of mmcv are looked up by their own names (``RoIAlign``). Where a function has the name
    of its module (``mmdet.models.losses.smooth_l1_loss``), mmengine finds no class by way of it:
    ``mmdet.models.losses.L1Loss``.
    """
    module, _, own = name.rpartition('.')
    kind = get_object_from_string(name) if module else None
    if name.startswith('mmcv.ops.') and kind not in MODELS.module_dict.values():
        return own
    if not module or kind is not None:
        return name
    try:
        kind = getattr(import_module(module), own)
    except (ImportError, AttributeError):  # the host says so, should it ever be built
        return name
    while '.' in module:
        module = module.rpartition('.')[0]
        if get_object_from_string(f'{module}.{own}') is kind:
            return f'{module}.{own}'
    return name


def type_name(cfg: object) -> str:
    """The ``type`` of a config without the package in front of it; classes count by their name.

    What is no config, but the thing itself (a hook that was built already), by its class' name.
    """
    kind = cfg.get('type') if isinstance(cfg, dict) else type(cfg)
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def find_scope(cfg: Config) -> str | None:
    """One of `HOSTS`; None where the config is of none.

    A config in pure Python has no default scope, and types such as ``mmdet.models.RetinaNet``. A
    package of the user's may have a scope of its own: its model's bases tell.
    """
    scope = cfg.get('default_scope')
    if scope in HOSTS:
        return scope
    model = cfg.get('model') or {}
    kind = model.get('kind') or model.get('type')
    package = str(kind).partition('.')[0]
    if package not in HOSTS and isinstance(kind, str):
        with MODELS.switch_scope_and_registry(scope) as registry:
            bases = getattr(registry.get(kind), '__mro__', ())
        packages = [base.__module__.partition('.')[0] for base in bases]
        package = next((package for package in packages if package in HOSTS), '')
    return package if package in HOSTS else None


def scope_of(cfg: Config) -> str:
    """One of `HOSTS`.

    Raises:
        ValueError: the config is of none.
    """
    scope = find_scope(cfg)
    if scope is None:
        raise ValueError(
            f'a config of {", ".join(HOSTS)} is needed\n  got default_scope '
            f'{cfg.get("default_scope")!r}, model {(cfg.get("model") or {}).get("type")!r}'
        )
    return scope


def use_scope(cfg: Config) -> str:
    """Registers everything of the config's package; names are looked up there from now on."""
    scope = scope_of(cfg)
    import_module(f'{scope}.utils').register_all_modules(init_default_scope=False)
    registries.init_default_scope(cfg.get('default_scope') or scope)
    return scope


def model_of(cfg: Config) -> Any:
    """The config of the model as a Runner builds it; a copy.

    MMPretrain's configs have ``data_preprocessor`` beside the model.
    """
    model = copy.deepcopy(cfg.model)
    if cfg.get('data_preprocessor') is not None:
        model.setdefault('data_preprocessor', copy.deepcopy(cfg.data_preprocessor))
    return model


def refuse_tracker(model: object) -> None:
    """Raises where a model takes videos, and a tool images.

    Raises:
        ValueError: it is one of MMDetection's trackers.
    """
    if any(base.__name__ == TRACKER for base in type(model).__mro__):
        raise ValueError(
            f'{type(model).__name__} follows objects through videos, and images are taken here\n'
            '  tools/test.py runs it; its detector alone: a config whose model is its '
            "model.detector, and a checkpoint of the weights below 'detector.'"
        )


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
        ValueError: it is a checkpoint, or names another package.
    """
    package, separator, name = source.partition('::')
    if not separator:
        if not Path(source).is_file():
            # Same folder first, then the repository's, then the package's.
            ours = Path(__file__).resolve().parents[1] / '.mim' / 'configs'
            near = compat.near_names(source, ours, Path('configs'))
            raise FileNotFoundError(f'no config file {source}{near}')
        if Path(source).suffix in WEIGHTS:
            raise ValueError(
                f'{source} is a file of weights: the config comes first, then the checkpoint'
            )
        return Path(source), None
    if package not in KNOWN:
        raise ValueError(
            f'{source!r} names no known package\n  expected '
            + ', '.join(f'{name}::...' for name in KNOWN)
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
    return Path(compat.package_folder(package)) / '.mim' / 'configs'


def imports_of(cfg: Config) -> list[str]:
    """What a config imports."""
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    return [imports] if isinstance(imports, str) else list(imports)


def add_hook(cfg: Config, hook: dict) -> None:
    """Appends a hook of ours to the config's custom hooks.

    Raises:
        ValueError: they are no list.
    """
    hooks = cfg.get('custom_hooks') or []
    if not isinstance(hooks, (list, tuple)):
        raise ValueError(f'custom_hooks must be a list of dicts\n  got {hooks!r}')
    cfg.custom_hooks = [*hooks, hook]
