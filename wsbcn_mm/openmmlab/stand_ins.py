"""What stands for modules that the hosts import and that are not there.

- The wheel of MMAction2 1.2.0 lacks ``mmaction.models.localizers.drn``, which ``mmaction.models``
  imports.
- MMPretrain imports torchvision, for the transforms ``torchvision/...``, `MAERandomResizedCrop`,
  `PILToTensor` and the boxes of visual grounding. No torchvision on PyPI fits the CPU build of
  torch, and classifying pictures needs none of them.

Whatever is used of a stand-in raises `Missing` with what to install. It is seen by the modules of
the host that import it and by nobody else: for all others torchvision is as missing as before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

DRN = 'mmaction.models.localizers.drn.drn'
FORGOTTEN = (
    'the wheel of mmaction2 on PyPI lacks it\n  pip install --no-deps '
    'git+https://github.com/open-mmlab/mmaction2'
)
# What mmpretrain imports of torchvision, and where.
TORCHVISION = (
    'torchvision',
    'torchvision.ops',
    'torchvision.ops.boxes',
    'torchvision.transforms',
    'torchvision.transforms.functional',
    'torchvision.transforms.transforms',
)
USERS = (
    'mmpretrain.datasets.transforms.formatting',
    'mmpretrain.datasets.transforms.processing',
    'mmpretrain.evaluation.metrics.visual_grounding_eval',
    'mmpretrain.models.utils.box_utils',
)
NOT_INSTALLED = 'torchvision is not installed\n  the one that belongs to your torch has it'


class Missing(ImportError):
    """Something was used that only the module has for which another one stands."""


class _Name(type):
    """The type of what a stand-in's names are: classes that can be named and subclassed."""

    why: str

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise Missing(f'{cls.__module__}.{cls.__name__}: {cls.why}')

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith('__'):
            raise AttributeError(name)
        raise Missing(f'{cls.__module__}.{cls.__name__}.{name}: {cls.why}')


class StandIn(ModuleType):
    """A module that has every name."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(name)
        self.why = why

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):
            raise AttributeError(name)
        return _Name(name, (), dict(__module__=self.__name__, why=self.why))


def apply() -> None:
    """Puts the stand-ins where they are needed; may be called more than once."""
    mmaction = find_spec('mmaction')
    if mmaction is not None and mmaction.origin and DRN not in sys.modules:
        file = Path(mmaction.origin).parents[1].joinpath(*DRN.split('.')).with_suffix('.py')
        if not file.is_file():
            sys.modules[DRN] = StandIn(DRN, FORGOTTEN)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the modules of mmpretrain that import torchvision, where there is none."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in USERS or find_spec('torchvision') is not None:
            return None
        found = PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None:
            return None
        loader = _Loader(fullname, found.origin)
        return spec_from_file_location(fullname, found.origin, loader=loader)


class _Loader(SourceFileLoader):
    """Runs a module with the stand-ins in ``sys.modules``, and takes them out again."""

    def exec_module(self, module: ModuleType) -> None:
        modules = {name: StandIn(name, NOT_INSTALLED) for name in TORCHVISION}
        for name, stand_in in modules.items():
            parent, _, child = name.rpartition('.')
            if parent:
                setattr(modules[parent], child, stand_in)
        sys.modules.update(modules)
        try:
            super().exec_module(module)
        finally:
            for name in modules:
                del sys.modules[name]
