"""Says which field of a config an error of the hosts is about, and what belongs there.

The hosts make everything out of dicts with a ``type``, each level handing parts to the next. What
they raise names a registry, an operator or nothing at all. The traceback still holds the dicts that
were being built: with them the field is found, and what its constructor takes. Only what is sure is
put in one sentence; any other error keeps its traceback.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType

import torch
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import Registry
from mmengine.runner import FlexibleRunner, Runner
from torch import nn
from torch.utils.data import DataLoader

from wsbcn_mm.openmmlab.config import HOSTS
from wsbcn_mm.openmmlab.explain import data
from wsbcn_mm.openmmlab.explain.statements import stopped_at_settings, what_there_is
from wsbcn_mm.openmmlab.explain.traces import (
    OUT_OF_MEMORY,
    Build,
    Frame,
    after,
    builds_of,
    frames_of,
    names_of_modules,
)
from wsbcn_mm.openmmlab.explain.values import mend, misfit, says_number
from wsbcn_mm.openmmlab.explain.versions import lacks_name
from wsbcn_mm.openmmlab.explain.wording import comma, said, short
from wsbcn_mm.openmmlab.loaders import LOADERS
from wsbcn_mm.openmmlab.places import dotted, walk
from wsbcn_mm.openmmlab.signatures import parameters_of

# What says how long and how a run goes.
RUN = (*LOADERS, 'train_cfg', 'optim_wrapper', 'param_scheduler', 'default_hooks', 'custom_hooks')
NAMES = ('constructor', 'ema_type', 'runner_type')  # of what has no dict of its own

# What a runner takes together, or not at all.
TOGETHER = (
    ('train_dataloader', 'train_cfg', 'optim_wrapper'),
    ('val_dataloader', 'val_cfg', 'val_evaluator'),
    ('test_dataloader', 'test_cfg', 'test_evaluator'),
)
# How the layers of torch call the channels of their input.
CHANNELS = ('in_channels', 'in_features', 'num_features', 'num_channels')


# What MMDetection 2 and its kin called what has another name now.
FORMER = dict(
    samples_per_gpu='batch_size',
    imgs_per_gpu='batch_size',
    workers_per_gpu='num_workers',
    img_prefix='data_prefix',
    seg_prefix='data_prefix',
    img_dir='data_prefix',
    ann_dir='data_prefix',
    classes='metainfo',
    flip_ratio='prob',
)


# torch's BatchNorm in training with one value per channel.
ONE_VALUE = (
    '\n  BatchNorm has no statistics of one image whose map is one pixel: tools/model_converters/'
    'convert_config.py puts BCN there; or larger batches (drop_last=True), or larger images'
)


# What a config is made of, so that it can be written.
PLAIN = (dict, list, tuple, set, str, int, float, complex, type(None))
OTHER_SIZES = (
    '\n  images of other sizes make no batch: batch_size=1 there, or a step that gives all one size'
)


class ConfigError(ValueError):
    """A field of a config cannot be used; the cause is what the host raised."""


@contextmanager
def named(cfg: Config) -> Iterator[None]:
    """Raises `ConfigError` in the place of an error that a field of the config brought about.

    Args:
        cfg: What is built or run.
    """
    try:
        yield
    except Exception as error:
        text = explain(cfg, error)
        if text is None:
            raise
        raise ConfigError(text) from error


def explain(cfg: Config, error: BaseException) -> str | None:
    """One sentence about the file or field that an error came from; None where that is not sure."""
    if type(error).__module__.startswith('wsbcn_mm.'):  # says all itself
        return None
    frames = frames_of(error)
    if text := lacks_name(error, frames) or data.explain(cfg, error):
        return text
    root = cfg._cfg_dict
    if not frames:
        return None
    if text := _not_written(root, error, frames) or _other_preprocessor(frames):
        return text
    builds, last = builds_of(root, frames), frames[-1]
    for build in reversed(builds):
        text = (
            _unknown_type(build, cfg.get('default_scope'))
            or (isinstance(error, TypeError) and _wrong_arguments(build, last.code))
            or _wrong_values(build, error)
        )
        if text:
            return text
    if text := _other_channels(builds, frames) or _shared_parameters(error, frames):
        return text
    if isinstance(error, IndexError) and (text := _one_alone(root, frames, error)):
        return text
    if builds and (text := stopped_at_settings(root, builds[-1], frames, error)):
        return text
    if builds and _is_of(builds[-1], frames, error):
        return _refused(builds[-1], error, frames)
    return (not builds and _of_runner(root, error, last)) or _texts_for_numbers(root, error)


def _is_of(build: Build, frames: list[Frame], error: BaseException) -> bool:
    """Whether an error says something about a part, and is no defect of somebody's code.

    Args:
        build: What was being built, or ran.
        frames: Where the error was raised.
        error: It.
    """
    last = frames[-1]
    called = last.code.co_name.startswith('build')  # with arguments that do not fit
    if build.runs:
        inner = after(build, frames)
        return called or (inner is not None and (last.raises or _is_of_hosts(inner, error)))
    if build.kind is None:  # read by mmengine itself
        hosts = [frame.module for frame in frames if frame.module.startswith(('mm', 'wsbcn_mm'))]
        return hosts[-1].startswith('mmengine.')
    return (
        called
        or last.raises
        or isinstance(error, (ImportError, OSError))
        or last.code in build.methods('__init__')
    )


def _is_of_hosts(inner: list[Frame], error: BaseException) -> bool:
    """Whether the hosts' own code stopped at sizes or names that do not fit, or lacks a package."""
    known = isinstance(error, (LookupError, RuntimeError, ImportError))
    known = known and not isinstance(error, OUT_OF_MEMORY)
    return known and all(frame.module.startswith((*HOSTS, 'mmcv', 'torch')) for frame in inner)


# ---- what is wrong with it -----------------------------------------------------------------------


def _unknown_type(build: Build, scope: str | None) -> str | None:
    """A name that no registry knows; no name at all; something else than a dict."""
    if build.kind is DataLoader and 'dataset' not in build.part:
        return f'{build.where} has no dataset'
    if build.kind is not None or build.registry is None:
        return None
    if isinstance(build.part, dict):
        where, name = f'{build.where}.type', build.part.get('type')
        if not isinstance(name, str):
            return (
                f'{build.where} has no type: the name of what is to be built\n'
                f'  got {short(build.part)}'
            )
    elif build.place[-1] in NAMES and isinstance(build.part, str):
        where, name = build.where, build.part
    else:
        return (
            f'{build.where} must be a dict with a type\n'
            f'  got {short(build.part)}{comma(build.part)}'
        )
    if scope not in (None, 'mmengine', *HOSTS):
        where = f'{where} (default_scope is {scope!r}, which is none of {", ".join(HOSTS)})'
    near = difflib.get_close_matches(name, _names_in(build.registry), n=3, cutoff=0.6)
    mean = f'\n  did you mean {" or ".join(map(repr, near))}?' if near else ''
    if scope in (None, 'mmengine') and '.' not in name and build.registry.scope == 'mmengine':
        is_one = 'has no default_scope, which' if scope is None else "'s default_scope"
        mean += f'\n  the config{is_one} is one of {", ".join(HOSTS)}'
    return (
        f'{where}: {name!r} is not known ({build.registry.name} of '
        f'{build.registry.scope}){mean}\n  a class of your own is known once its module is '
        "imported: custom_imports = dict(imports=['my_module'], allow_failed_imports=False)"
    )


def _names_in(registry: Registry) -> set[str]:
    names = set(registry.module_dict)
    return names | (_names_in(registry.parent) if registry.parent is not None else set())


def _wrong_arguments(build: Build, raised_in: CodeType) -> str | None:
    """Arguments that a class does not have, or needs and did not get.

    Args:
        build: The part.
        raised_in: Code that raised the TypeError: who calls the class with all of them, or the
            class itself, which hands some to its bases.
    """
    calls = raised_in.co_name.startswith(('build', '_clip'))
    calls = calls or raised_in is Runner.__init__.__code__ or not inspect.isclass(build.kind)
    if build.kind is None or build.runs or not (calls or raised_in in build.methods('__init__')):
        return None
    known = parameters_of(build.kind)
    unknown = [k for k in build.part if k in build.given and k not in known]
    if unknown:
        former = FORMER.get(unknown[0])
        near = [former] if former in known else []
        near = near or difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.6)
        mean = f'it has {", ".join(known)}\n  if a base gives it: {build.where} with _delete_=True'
        mean = f'did you mean {near[0]}?' if near else mean
        return f'{build.where}.{unknown[0]}: {build.name} has no such argument\n  {mean}'
    missing = [
        k for k, p in known.items() if p.default is p.empty and k not in build.given and k != 'self'
    ]
    if calls and len(missing) and raised_in.co_name == 'build_from_cfg':
        return f'{build.where}: {build.name} needs {", ".join(missing)}, which it does not have'
    return None


def _wrong_values(build: Build, error: BaseException) -> str | None:
    """Values of another kind than the class has them."""
    if build.kind is None or not isinstance(build.part, dict):
        return None
    known = parameters_of(build.kind)
    for key, value in build.part.items():
        if key in known and (wanted := misfit(value, known[key])):
            return (
                f'{build.where}.{key} must be {wanted}\n  got {value!r}{mend(value)}\n'
                f'  it ended in {said(error)}'
            )
    return None


def _of_runner(root: dict, error: BaseException, last: Frame) -> str | None:
    """What the runner itself does not take."""
    if last.code in Build((), None, FlexibleRunner).methods() and root.get('env_cfg') is None:
        return f'env_cfg is missing: FlexibleRunner needs it\n  it ended in {said(error)}'
    if last.code is not Runner.__init__.__code__:
        return None
    for together in TOGETHER:
        missing = [key for key in together if root.get(key) is None]
        if missing and len(missing) < len(together):
            there = ' and '.join(key for key in together if key not in missing)
            verb = 'is' if len(missing) == 1 else 'are'
            return f'{", ".join(missing)} {verb} missing, and {there} there: set all, or none'
    part = root.get('randomness')
    if isinstance(error, TypeError) and part is not None:
        if not isinstance(part, dict):
            return f'randomness must be a dict\n  got {part!r}'
        build = Build(('randomness',), part, Runner.set_randomness, None, tuple(part))
        return _wrong_arguments(build, last.code)
    return f'the config cannot be run\n  {said(error)}' if last.raises else None


def _other_channels(builds: list[Build], frames: list[Frame]) -> str | None:
    """A layer that gets another number of channels than it was made for."""
    if not builds or not builds[-1].runs:
        return None
    names = names_of_modules(frames)
    for frame in reversed(frames):
        layer, data = frame.names.get('self'), frame.names.get('input', frame.names.get('x'))
        if not isinstance(layer, nn.Module):
            continue
        wanted = next((n for n in map(layer.__dict__.get, CHANNELS) if isinstance(n, int)), None)
        if wanted is None or not isinstance(data, torch.Tensor) or data.dim() < 2:
            return None
        found = data.shape[-1 if isinstance(layer, nn.Linear) else 1]
        if found == wanted:
            return None
        build = builds[-1]
        own = {k: v for k, v in build.part.items() if 'in_' in k and 'channels' in k}
        values = ', '.join(f'{k}={short(v)}' for k, v in own.items())
        return (
            f'{build.where}: {build.name} is made for other channels than it gets'
            + (f'\n  it has {values}' if values else '')
            + f'\n  model.{names[id(layer)]} takes {wanted}, and got {found}'
        )
    return None


def _shared_parameters(error: BaseException, frames: list[Frame]) -> str | None:
    """Layers that share their parameters, which settings by parameter meet twice."""
    for frame in frames:
        if frame.code is DefaultOptimWrapperConstructor.__call__.__code__:
            model, own = frame.names['model'], frame.names['self']
            break
    else:
        return None
    if not isinstance(error, ValueError) or not own.paramwise_cfg:
        return None
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name and not own.paramwise_cfg.get('bypass_duplicate'):
            return (
                f'optim_wrapper.paramwise_cfg: layers of the model share parameters ({name} is '
                f'{first})\n  add bypass_duplicate=True to it\n  it ended in {said(error)}'
            )
    return None


def _one_alone(root: dict, frames: list[Frame], error: BaseException) -> str | None:
    """A setting that a comma made a tuple of one, in the hands of who looks for a second."""
    for place, value in walk(root.get('model'), ('model',)):
        if comma(value) and any(f.names.get(str(place[-1])) == value for f in frames):
            return (
                f'{dotted(place)} must be a number, or several\n  got {value!r}{comma(value)}\n'
                f'  it ended in {said(error)}'
            )
    return None


def _refused(build: Build, error: BaseException, frames: list[Frame]) -> str:
    """What the class itself, or whoever reads the field, says."""
    if build.part is None:
        return f'{build.where} is missing, or None\n  it ended in {said(error)}'
    what = ' cannot be used' if build.kind is None else f': {build.name} cannot be made'
    if build.runs:
        what = f': {build.name} stopped'
    if isinstance(build.part, dict):
        own = {k: v for k, v in build.part.items() if k not in ('type', '_scope_')}
        values = ', '.join(f'{k}={short(v)}' for k, v in own.items())
    else:
        values = short(build.part)
    commas = [
        f'\n  {dotted(place)}{comma(value)}'
        for place, value in walk(build.part, build.place)
        if comma(value) and isinstance(value[0], (dict, tuple, list))
    ]
    return (
        f'{build.where}{what}\n  {said(error)}{what_there_is(error, frames)}\n'
        f'  raised by {frames[-1].module}'
        + (f'\n  from {values}' if values else '')
        + ''.join(commas)
        + (OTHER_SIZES if _has_other_sizes(frames[-1]) else '')
        + (ONE_VALUE if frames[-1].code.co_name == '_verify_batch_size' else '')
    )


def _not_written(root: dict, error: BaseException, frames: list[Frame]) -> str | None:
    """A config that mmengine cannot write, as it does into the log and into checkpoints."""
    writes = Config.pretty_text.fget.__code__
    if not isinstance(error, SyntaxError) or all(frame.code is not writes for frame in frames):
        return None
    odd = [(place, value) for place, value in walk(root, ()) if not isinstance(value, PLAIN)]
    if not odd:
        return None
    place, value = odd[0]
    names = ', '.join(dict.fromkeys(str(place[0]) for place, _ in odd))
    return (
        f'{dotted(place)} is {short(value)}, and a config is made of numbers, texts, lists and '
        'dicts: mmengine writes it into the log and into checkpoints\n  if the file needs it to '
        f'compute others: `del {names}` at its end'
    )


def _other_preprocessor(frames: list[Frame]) -> str | None:
    """Images of other channels than the preprocessor turns from BGR to RGB."""
    last = frames[-1]
    image = last.names.get('_batch_input', last.names.get('_batch_inputs'))
    own = last.names.get('self')
    if not isinstance(own, ImgDataPreprocessor) or not isinstance(image, torch.Tensor):
        return None
    channels = image.shape[-3]
    if channels == 3 or not own._channel_conversion:
        return None
    return (
        f'model.data_preprocessor turns BGR to RGB (bgr_to_rgb or rgb_to_bgr), and gets images of '
        f'{channels} channels\n  set it to False, mean and std to {channels} values or None, and '
        f'in_channels={channels} of the backbone; or load images in colour'
    )


def _has_other_sizes(frame: Frame) -> bool:
    """Whether what a function was to stack are images of several sizes."""
    values = frame.names.get('inputs')
    values = values if isinstance(values, (list, tuple)) else ()
    shapes = {getattr(value, 'shape', None) for value in values}
    return frame.module.endswith('data_preprocessor') and len(shapes) > 1


def _texts_for_numbers(root: dict, error: BaseException) -> str | None:
    """A run that stopped at a text where a number belongs, and which one that may be."""
    if not isinstance(error, (TypeError, ValueError)):
        return None
    for field in RUN:
        for place, value in walk(root.get(field), (field,)):
            if 'dataset' in place:  # folders and years are texts of digits, and right
                continue
            if says_number(value):
                return (
                    f'{dotted(place)} must be a number\n  got {value!r}{mend(value)}\n'
                    f'  it ended in {said(error)}'
                )
    return None
