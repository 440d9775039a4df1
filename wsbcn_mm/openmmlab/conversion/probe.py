"""Looks into the model of a config: its nodes, what each one accepts, and which layers it builds.

A *node* is a dict with a ``type`` that builds a module. Constructors have defaults for ``norm_cfg``
and friends that no config shows, and pass them to parts of their own: what a config really builds
is known only when it is built. Nothing is initialised here, which makes it cheap.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, Registry
from torch import Tensor, nn

from wsbcn_mm.openmmlab import explain
from wsbcn_mm.openmmlab.config import HOSTS, no_model, type_name
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.places import Place, dotted
from wsbcn_mm.openmmlab.registry import CONVERTED, KEPT
from wsbcn_mm.openmmlab.signatures import parameters_of

# Dicts under these keys are built by mmcv's own builders, with arguments of their parents'.
LAYER_KEYS = {'norm_cfg', 'conv_cfg', 'act_cfg', 'upsample_cfg', 'init_cfg', 'loss'}

# mmcv's own SyncBN can be built only where several processes run.
SAME_LAYER = {'MMSyncBN': 'SyncBN'}


@dataclass
class Node:
    """A dict of the config that builds a module.

    Attributes:
        path: Keys and list positions from the config's root, ``('model', 'backbone')``.
        cfg: The dict itself.
        kind: The class that is built.
        defaults: What the class' constructor takes, with the defaults (``inspect._empty`` where
            there is none).
    """

    path: Place
    cfg: dict
    kind: type
    defaults: dict[str, Any]

    @property
    def where(self) -> str:
        """The path as one writes it, ``model.backbone``."""
        return dotted(self.path)

    def accepts(self, name: str) -> bool:
        """Whether the constructor has an argument of this name."""
        return name in self.defaults

    def get(self, name: str) -> Any:
        """The value in the config, else the constructor's default; None where there is neither."""
        value = self.cfg.get(name, self.defaults.get(name))
        return None if value is inspect.Parameter.empty else value


def register_hosts(cfg: Config) -> None:
    """Imports the models of the config's packages, so that their names are known."""
    scope = cfg.get('default_scope')
    if scope in HOSTS:
        importlib.import_module(f'{scope}.models')


def nodes(cfg: Config) -> list[Node]:
    """The nodes of ``cfg.model``, from the outside to the inside.

    Raises:
        NoModel: a ValueError; the config has no model.
    """
    model = cfg.get('model')
    if not isinstance(model, dict) or 'type' not in model:
        raise no_model(cfg.filename or 'the config')
    register_hosts(cfg)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        return list(_nodes(model, ('model',), None))


def _nodes(value: Any, path: Place, scope: str | None) -> Iterator[Node]:
    if isinstance(value, dict):
        scope = value.get('_scope_', scope)
        ours = type_name(value) in (CONVERTED, KEPT)
        kind = _class_of(value.get('kind' if ours else 'type'), scope)
        if kind is not None:
            yield Node(path, value, kind, constructor_defaults(kind))
        for key, item in value.items():
            if key not in LAYER_KEYS:
                yield from _nodes(item, (*path, key), scope)
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _nodes(item, (*path, i), scope)


def _class_of(kind: Any, scope: str | None) -> type | None:
    if isinstance(kind, str):
        with MODELS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    return kind if inspect.isclass(kind) and issubclass(kind, nn.Module) else None


def constructor_defaults(kind: type) -> dict[str, Any]:
    """The arguments of a class, those that ``**kwargs`` hands to its bases included."""
    return {name: parameter.default for name, parameter in parameters_of(kind).items()}


# ---- building ----------------------------------------------------------------------------------


class _Tagged(str):
    """A type name that knows its place in the config; survives copies of the dict around it."""

    path: Place


class CannotBuild(ValueError):
    """The model of a config cannot be built here; the cause is what its constructors raised."""


def build(cfg: Config) -> nn.Module:
    """Builds the model without initialising its weights.

    Every module that was built from a node of the config has the node's path as ``config_path``.

    Raises:
        CannotBuild: a constructor raised: a package, a file or a download is missing, or an
            argument is wrong.
    """
    try:
        return _build(cfg)
    except Exception as error:  # a constructor may raise anything: named, and raised again
        why = explain.explain(cfg, error) or f'{type(error).__name__}: {first_line(error)}'
        raise CannotBuild(
            f'the model of {cfg.filename or "the config"} cannot be built here\n  {why}'
        ) from error


def _build(cfg: Config) -> nn.Module:
    register_hosts(cfg)
    model = _tag(cfg.model, ('model',))
    original = Registry.build

    def build_and_mark(self: Registry, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        module: Any = original(self, cfg, *args, **kwargs)
        # A list is built in one go: its parts do not come by here.
        for part, built in zip(cfg, module) if isinstance(cfg, list) else [(cfg, module)]:
            kind = part.get('type') if isinstance(part, dict) else None
            if isinstance(kind, _Tagged) and isinstance(built, nn.Module):
                marked: Any = built
                marked.config_path = kind.path
        return module

    with (
        warnings.catch_warnings(),
        mock.patch.object(Registry, 'build', build_and_mark),
        without_initialisation(),
        DefaultScope.overwrite_default_scope(cfg.get('default_scope')),
    ):
        warnings.simplefilter('ignore')  # the hosts' own deprecations
        return MODELS.build(model)


def _tag(value: Any, path: Place) -> Any:
    if isinstance(value, dict):
        tagged = type(value)()
        for key, item in value.items():
            tagged[key] = _tag(item, (*path, key))
        if isinstance(tagged.get('type'), str):
            kind = _Tagged(SAME_LAYER.get(tagged['type'], tagged['type']))
            kind.path = path
            tagged['type'] = kind
        return tagged
    if isinstance(value, (list, tuple)):
        return type(value)(_tag(item, (*path, i)) for i, item in enumerate(value))
    return value


@contextmanager
def without_initialisation() -> Iterator[None]:
    """Skips torch's random initialisation: what it would fill is not looked at."""

    def nothing(tensor: Tensor, *_: object, **__: object) -> Tensor:
        return tensor

    names = [n for n in vars(torch.nn.init) if n.endswith('_') and not n.startswith('_')]
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(torch.nn.init, name, nothing))
        yield


def owners(model: Any) -> dict[str, Place]:
    """For each module name of a model from `build`: the path of the node that it belongs to."""
    owner: dict[str, Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        own = getattr(module, 'config_path', None)
        owner[name] = own or owner.get(name.rpartition('.')[0], ('model',))
    return owner
