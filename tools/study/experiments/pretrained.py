"""Weights of a backbone that was trained on another task, made when they are missing.

A run says by its ``pretraining`` how: the settings of another run, whose record is in the results
as well. Training repeats bit by bit on one kind of machine, so the weights themselves are kept only
as long as they save time.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments import loop, tasks


def keeper(spec: dict, folder: Path) -> Callable[[nn.Module], None]:
    """What keeps the backbone of a run after it, for `weights`.

    Args:
        spec: See `loop.run`.
        folder: Where weights are kept.
    """

    def keep(model: nn.Module) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = _file(spec, folder)
        part = file.with_suffix(f'.{os.getpid()}.part')
        torch.save(model.get_submodule('backbone').state_dict(), part)
        part.replace(file)

    return keep


def weights(
    spec: dict, folder: Path, report: Callable[[str], None], device: str = 'cpu'
) -> dict[str, Tensor]:
    """State dict of the backbone after the run ``spec``, which is done again if they are not kept.

    Args:
        spec: See `loop.run`.
        folder: Where weights are kept.
        report: Shows progress.
        device: Where a model trains.
    """
    file = _file(spec, folder)
    if not file.is_file():
        report(f'pretraining {spec["row"]}')
        task = tasks.make(spec['dataset'], spec['arguments'])
        loop.run(task, spec, report, after=keeper(spec, folder), device=device)
    return torch.load(file, weights_only=True, map_location='cpu')


def _file(spec: dict, folder: Path) -> Path:
    name = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f'{name}.pth'
