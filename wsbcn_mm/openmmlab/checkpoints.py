"""The one door for every file with weights: found, refused, read.

Nothing in a checkpoint runs, wherever it comes from: `guarded_loaders` closes mmengine's own ways
to one as well. What it fills of a model is said by `filling`.
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor

from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.files import damage

# What DataParallel and its kind put in front of a name, each around another.
WRAPPERS = re.compile(r'^(module\.)+')
# Where a file may hold its tensors: OpenMMLab's and the authors' key, then others'.
HOLDERS = ('state_dict', 'model', 'model_state_dict', 'state_dict_ema')
BY_LABEL = 'classes_by_label'  # in the meta of a checkpoint: names in the order of the labels


class CheckpointRefused(pickle.UnpicklingError, ValueError):
    """A checkpoint that is damaged, or that would run code."""


class CheckpointNotHad(OSError):
    """A checkpoint that is named by an address and cannot be had from there.

    Args:
        source: The address.
        reason: What its loader raised.
    """

    def __init__(self, source: str | os.PathLike, reason: BaseException) -> None:
        self.source = str(source)
        super().__init__(
            f'{source} cannot be loaded: {type(reason).__name__}: {first_line(reason)}\n  is the '
            'name right, and can this machine reach it? A file that was brought here another way '
            'is named by its path'
        )


class CheckpointMismatch(ValueError):
    """A checkpoint leaves tensors of the model unfilled, or was made for other layers."""


# ---- finding and reading -----------------------------------------------------------------------


def is_address(source: str | os.PathLike) -> bool:
    """Whether a checkpoint is named by an address (``https://``, ``torchvision://``), no file."""
    return '://' in str(source)


def at_hand(source: str | Path) -> bool:
    """Whether loading a checkpoint needs no download: a file, or an address that was loaded before.

    Downloads stay in torch's cache under the name that the address ends with, a model's name such
    as ``resnet50`` with a hash behind it.
    """
    if not is_address(source):
        return Path(source).expanduser().is_file()
    name = str(source).rpartition('/')[2]
    cache = Path(torch.hub.get_dir()) / 'checkpoints'
    return any(cache.glob(name)) or any(cache.glob(f'{name}-*.pth'))


def find_checkpoint(source: str | Path) -> Path:
    """The local file of that name, ``~`` expanded.

    Raises:
        FileNotFoundError: no such file; the message lists the checkpoints beside it, or in it where
            it is a folder.
        ValueError: it is no name of a file.
    """
    if not isinstance(source, (str, os.PathLike)) or not str(source):
        raise ValueError(
            f'a checkpoint is named by a path or an address; without one: None\n  got {source!r}'
        )
    path = Path(source).expanduser()
    if not path.is_file():
        folder = path if path.is_dir() else path.parent
        there = sorted(file.name for file in folder.glob('*.pth') if file.is_file())
        raise FileNotFoundError(
            f'no checkpoint file {path}\n  in {folder}: {", ".join(there) or "no .pth files"}'
        )
    return path


def read_checkpoint(source: str | Path, checksums: bool = True) -> dict:
    """Reads a checkpoint with torch's safe loader, onto the CPU.

    Args:
        source: A local file, or any address that mmengine knows.
        checksums: Compare those of all parts of a local file, which reads it once. Without them
            looking at its structure costs next to nothing: for a first look at a file that is
            loaded later.

    Returns:
        What it holds.

    Raises:
        FileNotFoundError: no such file; the message lists the checkpoints beside it.
        CheckpointRefused: a ValueError: damaged, or it would run code.
        ValueError: not a checkpoint.
    """
    if is_address(source):
        content = CheckpointLoader.load_checkpoint(str(source), 'cpu')
    else:
        content = load_file(find_checkpoint(source), 'cpu', checksums)
    if not isinstance(content, dict):
        raise ValueError(f'{source} holds a {type(content).__name__}, not a checkpoint')
    return content


def check_checkpoint(source: str | Path) -> None:
    """A first look, before anything expensive starts; addresses are left to the one who loads.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged, would run code, or is no checkpoint.
    """
    if not (isinstance(source, str) and is_address(source)):
        read_checkpoint(source, checksums=False)


def load_file(path: Path, map_location: Any, checksums: bool) -> object:
    """What a local file holds; see `read_checkpoint`."""
    reason = damage(path) if checksums else None
    if reason is not None:
        raise _damaged(path, reason)
    try:
        # Mapped where the format allows it. Said, because the environment can change the default.
        mapped = zipfile.is_zipfile(path)
        allow_checkpoint_globals()
        return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except CheckpointRefused:  # inside of `code_refused`
        raise
    except pickle.UnpicklingError as error:
        reason = damage(path)
        raise (refusal(path, error) if reason is None else _damaged(path, reason)) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = damage(path) or f'is damaged or incomplete\n  {first_line(error)}'
        raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> CheckpointRefused:
    return CheckpointRefused(
        f'the checkpoint {path} {reason}\n  use another one; `--resume` without a file takes the '
        'latest complete one of the work dir'
    )


def refusal(source: object, error: pickle.UnpicklingError) -> CheckpointRefused:
    """What to raise where torch's safe loader refuses a file, with the class that it stopped at."""
    asked = re.search(r'(?:GLOBAL|global|attribute) `?\'?([\w.]+)', str(error))
    return CheckpointRefused(
        f'{source} was refused: it holds more than tensors and numbers'
        + (f' ({asked[1]})' if asked else '')
        + ', and loading it could run any code\n  if you made it yourself, save its '
        "state_dict alone: torch.save(dict(state_dict=...), 'new.pth')"
    )


def allow_checkpoint_globals() -> None:
    """Puts what mmengine's own checkpoints hold, beside tensors, on torch's allow-list.

    Before each file: the fork's mmengine takes some of it off the list when it has read one.
    """
    torch.serialization.add_safe_globals(checkpoint_globals())


@functools.cache
def checkpoint_globals() -> list[Any]:
    """What mmengine's own checkpoints hold beside tensors."""
    import numpy as np
    from mmengine.logging.history_buffer import HistoryBuffer

    multiarray = importlib.import_module(
        'numpy._core.multiarray' if find_spec('numpy._core') else 'numpy.core.multiarray'
    )
    # Statistics of the log, as numpy arrays and scalars of these types.
    dtypes = [type(np.dtype(kind)) for kind in ('f8', 'f4', 'f2', 'i8', 'i4', 'u1', '?')]
    arrays = [multiarray._reconstruct, multiarray.scalar, np.ndarray, np.dtype, *dtypes]

    def history_buffer_method(owner: Any, name: str) -> Callable[..., Any]:
        # A pickled HistoryBuffer names its methods through getattr. The real getattr on the list
        # would let a checkpoint reach anything; this stands in for it and knows that one class.
        if owner is HistoryBuffer and name in HistoryBuffer._statistics_methods:
            return getattr(HistoryBuffer, name)
        raise pickle.UnpicklingError(f'a checkpoint may not ask for attribute {name!r} of {owner}')

    HistoryBuffer()  # fills the table of its methods
    return [HistoryBuffer, *arrays, (history_buffer_method, 'builtins.getattr')]


# ---- what is in one ----------------------------------------------------------------------------


def holder_of_tensors(checkpoint: dict) -> dict:
    """The dict inside of a checkpoint that holds the tensors of the model; maybe itself."""
    for key in HOLDERS:
        if isinstance(checkpoint.get(key), dict):
            return holder_of_tensors(checkpoint[key])
    return checkpoint


def without_wrappers(name: str) -> str:
    """The name of a tensor without the ``module.`` that each wrapper of a model puts in front."""
    return WRAPPERS.sub('', name)


def is_dense(value: Tensor) -> bool:
    """Whether a tensor is copied into a parameter as it is: neither sparse nor quantized."""
    return value.layout == torch.strided and not value.is_quantized


def _holds_tensors(value: object) -> bool:
    return isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values())


def state_dict_of(checkpoint: dict, source: str | Path = 'the checkpoint') -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the ``module.`` of wrappers.

    Args:
        checkpoint: What `read_checkpoint` returned. The tensors are those of its ``state_dict`` or
            ``model``, or its own.
        source: Names it in the error.

    Raises:
        CheckpointMismatch: there are none.
    """
    holder = holder_of_tensors(checkpoint)
    tensors = {
        without_wrappers(str(key)): value
        for key, value in holder.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        keys = ', '.join(map(str, list(holder)[:6])) or 'none'
        inside = [key for key, value in holder.items() if _holds_tensors(value)]
        arrays = any(type(value).__module__ == 'numpy' for value in holder.values())
        raise CheckpointMismatch(
            f'{source} holds no tensors of a model by name\n  its keys: {keys}'
            + ('\n  they are arrays of NumPy: torch.from_numpy makes tensors of them' * arrays)
            + ''.join(f"\n  maybe torch.save(checkpoint[{k!r}], 'new.pth')" for k in inside[:1])
        )
    return tensors


def meta_of(checkpoint: dict) -> dict:
    """What a checkpoint says about itself (``meta``); empty where it says nothing."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}
