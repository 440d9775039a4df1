"""The one door for every file with weights: found, refused, read, compared with a model, loaded.

Nothing in a checkpoint runs, wherever it comes from: `guard_loaders` closes mmengine's own ways to
one as well. What a checkpoint fills of a model is asked by one rule (`compare`), over all
parameters and buffers. Where results are computed a model must be filled completely (`load`);
where training starts, it is said what was not (`wsbcn_mm.openmmlab.hooks.checkpoints`).
"""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.openmmlab.files import damage

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
        content = _load_file(find_checkpoint(source), 'cpu', checksums)
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


def _load_file(path: Path, map_location: Any, checksums: bool) -> object:
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
        raise (_refusal(path, error) if reason is None else _damaged(path, reason)) from error
    except Exception as error:  # a damaged pickle can raise anything
        reason = damage(path) or f'is damaged or incomplete\n  {first_line(error)}'
        raise _damaged(path, reason) from error


def _damaged(path: Path, reason: str) -> CheckpointRefused:
    return CheckpointRefused(
        f'the checkpoint {path} {reason}\n  use another one; `--resume` without a file takes the '
        'latest complete one of the work dir'
    )


def _refusal(source: object, error: pickle.UnpicklingError) -> CheckpointRefused:
    """What to raise where torch's safe loader refuses a file, with the class that it stopped at."""
    asked = re.search(r'(?:GLOBAL|global|attribute) `?\'?([\w.]+)', str(error))
    return CheckpointRefused(
        f'{source} was refused: it holds more than tensors and numbers'
        + (f' ({asked[1]})' if asked else '')
        + ', and loading it could run any code\n  if you made it yourself, save its '
        "state_dict alone: torch.save(dict(state_dict=...), 'new.pth')"
    )


# ---- mmengine's own ways to a checkpoint -------------------------------------------------------


def guard_loaders() -> None:
    """Makes mmengine's loaders refuse what is damaged or would run code, whatever the scheme.

    `load_from`, `resume`, ``init_cfg``, averaged models and teachers all come by
    ``CheckpointLoader.load_checkpoint``. Its loader of local files is replaced by ours. Those of
    addresses download by themselves; while one runs, ``torch.load`` has its check on, which
    ``torch.hub`` turns off.
    """
    original = CheckpointLoader.load_checkpoint
    if getattr(original, 'refuses_code', False):
        return

    def load_from_local(filename: str, map_location: Any = None) -> object:
        return _load_file(find_checkpoint(filename), map_location, checksums=True)

    def load_checkpoint(
        filename: str | os.PathLike, map_location: Any = None, logger: str = 'current'
    ) -> object:
        with code_refused(filename):
            try:
                content = original(str(filename), map_location, logger)
            except CheckpointRefused:
                raise
            except Exception as error:  # of torch.hub, of storages, of lists of names
                if not is_address(filename):
                    raise
                raise CheckpointNotHad(filename, error) from error
        if isinstance(content, dict):
            meta_of(content).pop('config', None)  # a text that mmengine runs when it resumes
        return content

    load_checkpoint.refuses_code = True  # type: ignore[attr-defined]
    CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.load_checkpoint = staticmethod(load_checkpoint)


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
            raise _refusal(source, error) from error

    with mock.patch.object(torch, 'load', load):
        yield


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


def state_dict_of(checkpoint: dict, source: str | Path = 'the checkpoint') -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, without the ``module.`` of a wrapped model.

    Args:
        checkpoint: What `read_checkpoint` returned. The tensors are those of its ``state_dict`` or
            ``model``, or its own.
        source: Names it in the error.

    Raises:
        CheckpointMismatch: there are none.
    """
    holder = holder_of_tensors(checkpoint)
    tensors = {
        str(key).removeprefix('module.'): value
        for key, value in holder.items()
        if isinstance(value, Tensor)
    }
    if not tensors:
        keys = ', '.join(map(str, list(holder)[:6])) or 'none'
        raise CheckpointMismatch(
            f'{source} holds no tensors of a model by name\n  its keys: {keys}'
        )
    return tensors


def meta_of(checkpoint: dict) -> dict:
    """What a checkpoint says about itself (``meta``); empty where it says nothing."""
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


# ---- what it fills of a model ------------------------------------------------------------------


@dataclass
class Comparison:
    """What a state dict fills of a model's parameters and buffers.

    BatchNorm's counters (``num_batches_tracked``) are left out: no result depends on them.

    Attributes:
        filled: Names of tensors that it fills.
        missing: Names that it does not have.
        other_shape: Names that it has in another shape, with the shape there and the model's.
        left_over: Names in the state dict that the model has no place for.
        not_numbers: Parameters that it fills with NaN or infinity, statistics with what is none.
        unlike: What is wrong where the checkpoint records other settings of the layers, with the
            lines of a config that mend it.
    """

    filled: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    other_shape: dict[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)
    left_over: list[str] = field(default_factory=list)
    not_numbers: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the model computes what the checkpoint's model did."""
        return not (self.missing or self.other_shape or self.not_numbers or self.unlike)

    def __str__(self) -> str:
        unfilled = len(self.missing) + len(self.other_shape)
        total = len(self.filled) + unfilled
        if unfilled:
            share = f'({100 * unfilled / total:.0f} %)'
            lines = [f'does not fill {unfilled} of the {total} tensors of this model {share}']
        else:
            lines = [f'fills all {total} tensors of this model']
        if self.missing:
            lines.append(f'not in the file: {_some(self.missing)}')
        for name, (found, wanted) in list(self.other_shape.items())[:4]:
            lines.append(f'of another shape: {name}: {tuple(found)} for {tuple(wanted)}')
        if len(self.other_shape) > 4:
            lines.append(f'  and {len(self.other_shape) - 4} more')
        if self.left_over:
            lines.append(f'left over in the file: {_some(self.left_over)}')
        if unfilled:
            asked = 'is it the checkpoint of another config (classes, norm, layers)?'
            lines.append(_prefixed(self.missing, self.left_over) or asked)
        if self.not_numbers:
            lines.append(f'NaN, infinite, a variance below 0: {_some(self.not_numbers)}')
            lines.append('did its training diverge? take an earlier one')
        return '\n  '.join([*lines, *self.unlike])


def _prefixed(missing: list[str], left_over: list[str]) -> str | None:
    """What names begin with, where that is all: a wrapper's name, or a part's."""
    left = [name for name in left_over if not name.endswith('num_batches_tracked')]
    wrapped = 'all names in the file begin with {!r}, a wrapper: save what it wraps'
    part = 'it is the checkpoint of a part of the model alone ({!r})'
    for longer, shorter, text in ((left, missing, wrapped), (missing, left, part)):
        for name in longer if shorter else ():
            prefix = name.removesuffix(shorter[0])
            if prefix != name and {prefix + other for other in shorter} <= {*longer}:
                return text.format(prefix)
    return None


def _some(names: list[str], at_most: int = 4) -> str:
    rest = len(names) - at_most
    return ', '.join(names[:at_most]) + (f' and {rest} more' if rest > 0 else '')


def compare(
    model: nn.Module, state_dict: dict[str, Tensor], checkpoint: dict | None = None
) -> Comparison:
    """What a state dict would fill of a model; the model stays as it is.

    The model itself is asked, as when it loads: parts that take tensors under other names (older
    versions, student and teacher) are judged by what they make of them.

    Args:
        model: The model, not wrapped.
        state_dict: Tensors by name; a leading ``module.`` is passed over.
        checkpoint: Where they are from; its ``meta`` may hold ``formula`` and ``affine``.
    """
    return _load(model, state_dict, checkpoint or {}, copy=False)


def load(
    model: nn.Module,
    state_dict: dict[str, Tensor],
    checkpoint: dict | None = None,
    strict: bool = True,
    source: str | Path = 'the checkpoint',
) -> Comparison:
    """Copies a state dict into a model, and says what it filled.

    Args:
        model: See `compare`.
        state_dict: See there.
        checkpoint: See there.
        strict: All of the model must be filled.
        source: Names the checkpoint in the error.

    Raises:
        CheckpointMismatch: it is not; nothing was copied.
    """
    if strict:
        found = compare(model, state_dict, checkpoint)
        if not found.complete:
            raise CheckpointMismatch(f'{source} {found}')
    return _load(model, state_dict, checkpoint or {}, copy=True)


def _load(
    model: nn.Module, state_dict: dict[str, Tensor], checkpoint: dict, copy: bool
) -> Comparison:
    names = defaultdict(list)
    shapes = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):  # a module may have other things to save
            names[name.rpartition('.')[0]].append(name)
            shapes[name] = value.shape
    found = Comparison(unlike=settings_unlike(model, checkpoint))
    learned = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def look(_module: nn.Module, state: dict, prefix: str, *_: object) -> None:
        # Called for every module in turn, after whatever renames tensors for it. What is taken out
        # of `state` here is not copied.
        for name in names[prefix[:-1]]:
            value = state.get(name)
            if not isinstance(value, Tensor):  # torch passes over what is none
                found.missing.append(name)
            elif value.shape != shapes[name]:
                found.other_shape[name] = (value.shape, shapes[name])
            else:
                found.filled.append(name)
                statistic = 'running_' in name  # infinite ones, of dead channels, are about
                least = 0 if name.endswith('running_var') else -torch.inf
                right = value >= least if statistic else value.isfinite()
                if (statistic or name in learned) and not value.is_meta and not right.all():
                    found.not_numbers.append(name)
                if copy:
                    continue
            state.pop(name, None)

    handles = [module.register_load_state_dict_pre_hook(look) for module in model.modules()]
    state = OrderedDict((k.removeprefix('module.'), v) for k, v in state_dict.items())
    try:
        found.left_over = list(model.load_state_dict(state, strict=False).unexpected_keys)
    finally:
        for handle in handles:
            handle.remove()
    for listed in (found.filled, found.missing):
        listed[:] = [name for name in listed if not name.endswith('num_batches_tracked')]
    return found


def settings_unlike(model: nn.Module, checkpoint: dict) -> list[str]:
    """What is wrong where a checkpoint records other settings than the layers of the model have.

    Args:
        model: The model.
        checkpoint: Its ``meta`` may hold ``formula`` and ``affine``, as our converter writes them.

    Returns:
        For each of them a sentence, with the config line that mends it.
    """
    meta = meta_of(checkpoint)
    found = []
    for name, kind, layer, place in (
        ('formula', WeightStandardized, 'WSConv2d', 'conv_cfg'),
        ('affine', BatchChannelNorm, 'BCN', 'norm_cfg'),
    ):
        if meta.get(name) is None:
            continue
        others = {getattr(m, name) for m in model.modules() if isinstance(m, kind)} - {meta[name]}
        if others:
            found.append(
                f'the checkpoint is for {name} {meta[name]!r}, layers of this model have '
                f'{", ".join(sorted(map(repr, others)))}\n'
                f'  set {place}=dict(type={layer!r}, {name}={meta[name]!r})'
            )
    return found
