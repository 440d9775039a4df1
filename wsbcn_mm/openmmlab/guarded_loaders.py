"""MMEngine's own ways to a checkpoint: none of them runs what is in it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from mmengine.runner.checkpoint import CheckpointLoader

from wsbcn_mm.openmmlab.checkpoints import (
    CheckpointNotHad,
    CheckpointRefused,
    allow_checkpoint_globals,
    find_checkpoint,
    is_address,
    load_file,
    meta_of,
    refusal,
)
from wsbcn_mm.openmmlab.patches import surround


def guard_loaders() -> None:
    """Makes mmengine's loaders refuse what is damaged or would run code, whatever the scheme.

    `load_from`, `resume`, ``init_cfg``, averaged models and teachers all come by
    ``CheckpointLoader.load_checkpoint``. Its loader of local files is replaced by ours. Those of
    addresses download by themselves; while one runs, ``torch.load`` has its check on, which
    ``torch.hub`` turns off.
    """
    CheckpointLoader.register_scheme(prefixes='', loader=_load_from_local, force=True)
    surround(CheckpointLoader, 'load_checkpoint', _load_checkpoint)


def _load_from_local(filename: str, map_location: Any = None) -> object:
    return load_file(find_checkpoint(filename), map_location, checksums=True)


def _load_checkpoint(
    original: Callable[..., object],
    loader: type[CheckpointLoader],
    filename: str | os.PathLike,
    map_location: Any = None,
    logger: str = 'current',
) -> object:
    with code_refused(filename):
        try:
            content = original(loader, str(filename), map_location, logger)
        except CheckpointRefused:
            raise
        except Exception as error:  # of torch.hub, of storages, of lists of names
            if not is_address(filename):
                raise
            raise CheckpointNotHad(filename, error) from error
    if isinstance(content, dict):
        meta_of(content).pop('config', None)  # a text that mmengine runs when it resumes
    return content


@contextmanager
def code_refused(source: object) -> Iterator[None]:
    """While it lasts, ``torch.load`` has its check on, also where it is told otherwise.

    Args:
        source: What the error names.
    """
    original = torch.load

    def load(*args: Any, **kwargs: Any) -> Any:
        allow_checkpoint_globals()
        try:  # said, because the environment can change the default of torch
            return original(*args, **{**kwargs, 'weights_only': True})
        except pickle.UnpicklingError as error:
            raise refusal(source, error) from error

    with mock.patch.object(torch, 'load', load):
        yield
