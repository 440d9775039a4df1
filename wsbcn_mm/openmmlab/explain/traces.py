"""Which part of a config was being built, or ran, when an error was raised.

The traceback holds it: the functions of mmengine and mmcv that build have the dict in hands, and
what runs is an object of a class that the config names.
"""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset.base_dataset import Compose
from mmengine.evaluator import BaseMetric, Evaluator
from mmengine.fileio import get_file_backend
from mmengine.hooks import Hook
from mmengine.model import initialize
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import (
    FUNCTIONS,
    MODELS,
    OPTIMIZERS,
    RUNNERS,
    WEIGHT_INITIALIZERS,
    Registry,
)
from mmengine.runner import BaseLoop, Runner
from mmengine.visualization.vis_backend import BaseVisBackend
from torch import nn
from torch.utils.data import DataLoader

from wsbcn_mm.openmmlab.compat import unwrapped
from wsbcn_mm.openmmlab.config import HOSTS, type_name
from wsbcn_mm.openmmlab.loaders import LOADERS
from wsbcn_mm.openmmlab.places import Place, dotted, place_of, same, value_at, walk

# What mmengine does with a field that has no type, by the name of the function that does it.
STEPS: dict[str, tuple[Place, Callable[..., Any] | None]] = {
    'setup_env': (('env_cfg',), None),
    'set_multi_processing': (('env_cfg', 'mp_cfg'), None),
    'init_dist': (('env_cfg', 'dist_cfg'), None),
    'set_randomness': (('randomness',), Runner.set_randomness),
    'build_logger': (('log_level',), None),
    'build_visualizer': (('visualizer',), None),
    'build_log_processor': (('log_processor',), None),
    'build_optim_wrapper': (('optim_wrapper',), None),
    '_clip_grad': (('optim_wrapper', 'clip_grad'), torch.nn.utils.clip_grad_norm_),
    'build_param_scheduler': (('param_scheduler',), None),
    'build_train_loop': (('train_cfg',), None),
    'build_val_loop': (('val_cfg',), None),
    'build_test_loop': (('test_cfg',), None),
    'register_default_hooks': (('default_hooks',), None),
    'register_custom_hooks': (('custom_hooks',), None),
    'scale_lr': (('auto_scale_lr',), None),
    'wrap_model': (('model_wrapper_cfg',), None),
    '_maybe_compile': (('compile',), None),
    '_check_scheduler_cfg': (('param_scheduler',), None),
    'add_params': (('optim_wrapper', 'paramwise_cfg'), None),
}
# Where a function of mmengine has a part of the config in hands, and where it looks up its type.
HOLDERS: dict[Any, tuple[str, Registry | None]] = {
    Compose.__init__.__code__: ('transforms', None),
    DefaultOptimWrapperConstructor.__call__.__code__: ('optimizer_cfg', OPTIMIZERS),
    get_file_backend.__code__: ('backend_args', None),
    initialize.__code__: ('init_cfg', WEIGHT_INITIALIZERS),
}
# What mmengine takes out of a loader before torch's class sees the rest.
OF_LOADERS = ('dataset', 'num_batch_per_epoch', 'disable_subprocess_warning')
# Where what runs and is no module was built from, by its class; everything else is of the model.
RUNNING: tuple[tuple[type, tuple[str, ...]], ...] = (
    (Hook, ('custom_hooks', 'default_hooks')),
    (BaseMetric, ('val_evaluator', 'test_evaluator')),
    (Evaluator, ('val_evaluator', 'test_evaluator')),
    (BaseTransform, LOADERS),
    (BaseVisBackend, ('visualizer',)),
    (object, ('model',)),
)
LOOPS = ('train', 'val', 'test')
OUT_OF_MEMORY = (MemoryError, torch.cuda.OutOfMemoryError)
# Packages that are as their makers released them.
RELEASED = ('mmengine', 'mmcv', 'wsbcn_mm', 'torch', *HOSTS)


@dataclass
class Build:
    """A part of a config that was being built when an error was raised.

    Attributes:
        place: Where it stands.
        part: What stands there; a dict, unless that is the mistake.
        kind: The class or function that it is for; None where its name is not known.
        registry: Where that name was looked up.
        given: The names of what was passed to ``kind``.
        runs: It had been built, and ran.
    """

    place: Place
    part: Any
    kind: Callable[..., Any] | None
    registry: Registry | None = None
    given: tuple[str, ...] = ()
    runs: bool = False

    @property
    def where(self) -> str:
        """The place as one writes it."""
        return dotted(self.place)

    @property
    def name(self) -> str:
        """Of what is built."""
        return getattr(self.kind, '__name__', str(self.kind))

    def methods(self, *names: str) -> set[CodeType]:
        """The code of its methods, those of its bases included; of these names, if there are."""
        if not inspect.isclass(self.kind):
            return {self.kind.__code__} if inspect.isfunction(self.kind) else set()
        found = [m for kind in inspect.getmro(self.kind) for m in vars(kind).items()]
        return {f.__code__ for n, f in found if inspect.isfunction(f) and (not names or n in names)}


@dataclass
class Frame:
    """A level of a traceback: its code, variables and module, and whether it raises an error."""

    code: CodeType
    names: dict[str, Any]
    module: str
    line: int
    raises: bool = False

    @property
    def is_released(self) -> bool:
        """Whether it is no code of the user."""
        return self.module.partition('.')[0] in RELEASED

    def function(self) -> ast.AST | None:
        """What its code was made of, with the lines of the file; None without source."""
        try:
            lines, first = inspect.getsourcelines(self.code)
            tree = ast.parse(textwrap.dedent(''.join(lines)))
        except (OSError, SyntaxError):  # no file; a part of an expression
            return None
        return ast.increment_lineno(tree, max(first, 1) - 1)

    def statement(self) -> ast.stmt | None:
        """What was being done, the innermost statement of its line."""
        found = [
            node
            for node in ast.walk(self.function() or ast.Module([], []))
            if isinstance(node, ast.stmt)
            and node.lineno <= self.line <= (node.end_lineno or self.line)
        ]
        return found[-1] if found else None  # outer ones come first

    def statement_text(self) -> str:
        """The first line of `statement`; nothing without source."""
        statement = self.statement()
        text = '' if statement is None else ast.unparse(statement).split('\n')[0]
        return ' '.join(text.split())


def frames_of(error: BaseException) -> list[Frame]:
    """The levels of a traceback, from the outside in."""
    found = list(traceback.walk_tb(error.__traceback__))
    position = _last_position(error)
    if found and found[-1][0].f_code is Runner.call_hook.__code__ and error.__context__:
        # mmengine raises another error in the place of a hook's TypeError.
        found += list(traceback.walk_tb(error.__context__.__traceback__))[1:]
        position = _last_position(error.__context__)
    frames = [
        Frame(f.f_code, f.f_locals, str(f.f_globals.get('__name__')), line) for f, line in found
    ]
    if frames:
        frames[-1].raises = frames[-1].code.co_code[position] == dis.opmap['RAISE_VARARGS']
    return frames


def _last_position(error: BaseException) -> int:
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return 0 if last is None else last.tb_lasti


def builds_of(root: dict, frames: list[Frame]) -> list[Build]:
    """The parts that were being built or ran, from the outside in."""
    builds: list[Build] = []
    names = names_of_modules(frames)
    for frame in frames:
        own = frame.names.get('self')
        if isinstance(own, BaseLoop) and frame is not frames[-1]:
            continue  # everything runs in one
        if isinstance(own, nn.Module) and all(build.runs for build in builds):
            build = _module(root, names.get(id(own), ''), frames)
        elif frame.is_released:
            build = _build_of(root, builds[-1].place if builds else (), frame)
        else:
            build = None
        if build is not None:
            if builds and builds[-1].place == build.place:
                builds.pop()  # handed on
            builds.append(build)
    return builds


def _build_of(root: dict, outer: Place, frame: Frame) -> Build | None:
    """What a function has in hands; None where that is no part of the config."""
    code, names = frame.code, frame.names
    of_mmengine = frame.module.startswith('mmengine.')
    if code in HOLDERS:
        name, registry = HOLDERS[code]
        return _part(root, outer, names.get(name), registry, names)
    if code.co_name in STEPS and of_mmengine:
        place, kind = STEPS[code.co_name]
        part = value_at(root, place, None)
        return Build(place, part, kind, given=tuple(part) if isinstance(part, dict) else ())
    if code.co_name == 'build_dataloader' and isinstance(names.get('dataloader'), dict):
        return _loader(root, names['dataloader'])
    if code.co_name == 'build_runner_from_cfg':
        kind = root.get('runner_type')
        known = not isinstance(kind, str) or RUNNERS.get(kind) is not None
        return None if known else Build(('runner_type',), kind, None, RUNNERS)
    if code.co_name.startswith('build') and 'cfg' in names:
        return _part(root, outer, names['cfg'], names.get('registry', MODELS), names)
    own = names.get('self')
    if isinstance(own, OptimWrapper):
        part = root.get('optim_wrapper')
        return Build(('optim_wrapper',), part, type(own))
    if isinstance(own, BaseLoop):
        named = [f'{n}_cfg' for n in LOOPS if getattr(own.runner, f'_{n}_loop', None) is own]
        return Build((named[0],), root.get(named[0]), type(own), runs=True) if named else None
    if isinstance(own, nn.Module):
        return None
    return object_of(root, own, next(fields for kind, fields in RUNNING if isinstance(own, kind)))


def _part(
    root: dict, outer: Place, part: Any, registry: Registry | None, names: dict[str, Any]
) -> Build | None:
    """A part by what a function calls it and by what it makes of it."""
    kind = part.get('type') if isinstance(part, dict) else None
    known = kind
    if isinstance(kind, str):
        known = None if registry is None else registry.get(kind)
    place = place_of(root, part, outer)
    if place is None and isinstance(kind, str):
        everything = list(walk(root, ()))
        # What its class has changed in it already.
        alike = [p for p, v in everything if isinstance(v, dict) and v.get('type') == kind]
        place = alike[0] if len(alike) == 1 else None
        # A name alone, of which mmengine makes a dict.
        named = [p for p, v in everything if v == kind and p[-1] != 'type']
        if place is None and known is None:
            return Build(named[0], kind, None, registry) if named else None
    if place is None:
        return None
    passed = [names[n] for n in ('args', 'cfg_') if isinstance(names.get(n), dict)]
    given = (passed or [part])[0] if isinstance(part, dict) else ()
    given = tuple(k for k in given if k not in ('type', '_scope_'))
    return Build(place, value_at(root, place), known, registry, given)


def _loader(root: dict, part: dict) -> Build | None:
    """A data loader, or what in it has an unknown name."""
    place = place_of(root, part, ())
    if place is None:
        return None
    for key in ('collate_fn', 'worker_init_fn'):
        kind = (part.get(key) or {}).get('type')
        if isinstance(kind, str) and FUNCTIONS.get(kind) is None:
            return Build((*place, key), part[key], None, FUNCTIONS)
    given = tuple(k for k in part if k not in OF_LOADERS)
    return Build(place, value_at(root, place), DataLoader, None, given)


def names_of_modules(frames: list[Frame]) -> dict[int, str]:
    """The names of the modules of the model that ran, by their identity."""
    modules = [frame.names.get('self') for frame in frames]
    model = next((m for m in modules if isinstance(m, nn.Module)), None)
    try:
        return {id(m): name for name, m in unwrapped(model).named_modules()} if model else {}
    except AttributeError:  # it was being made
        return {}


def _module(root: dict, name: str, frames: list[Frame]) -> Build | None:
    """The part of the model's config in which a module is that ran."""
    place: Place = ('model',)
    part = root.get('model')
    modules = [frame.names.get('self') for frame in frames]
    module: Any = next(m for m in modules if isinstance(m, nn.Module))
    module = unwrapped(module)
    for key in name.split('.') if name else ():
        inner = value_at(part, (int(key) if key.isdigit() else key,), None)
        if not isinstance(inner, (dict, list)):
            break
        module, part = getattr(module, key), inner
        place = (*place, int(key) if key.isdigit() else key)
    return Build(place, part, type(module), runs=True)


def object_of(root: dict, own: object, fields: tuple[str, ...]) -> Build | None:
    """What was built from a dict of these fields and runs, by its class and what it has."""
    found = [
        Build(place, value, type(own), runs=True)
        for place, value in walk({key: root.get(key) for key in fields}, ())
        if isinstance(value, dict) and type_name(value) == type(own).__name__
    ]
    alike = [
        build
        for build in found
        if all(_alike(getattr(own, key, item), item) for key, item in build.part.items())
    ]
    return next(iter(alike or found), None)


def _alike(one: Any, other: Any) -> bool:
    """Whether values are equal; lists and tuples of the same are."""
    kinds = (list, tuple)
    both = isinstance(one, kinds) and isinstance(other, kinds)
    return same(list(one), list(other)) if both else same(one, other)


def after(build: Build, frames: list[Frame]) -> list[Frame] | None:
    """What ran from the methods of a part on; None where some of that is the user's own code."""
    methods = build.methods()
    first = max((i for i, frame in enumerate(frames) if frame.code in methods), default=None)
    if first is None:
        return None
    inner = frames[first:]
    return inner if all(frame.is_released for frame in inner[1:]) else None
