"""Converts one upstream config and sees what comes of it: built, audited, trained, read back.

`examine` is what tools/dev/sweep_upstream.py calls for every config that the installed
packages ship, and what a sample of them goes through in the tests.
"""

from __future__ import annotations

import functools
import importlib
import logging
import multiprocessing
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from networks import network_of
from torch import nn
from trial import reason_of, try_network

from wsbcn_mm.audit import has_problems
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.audit import audit_built
from wsbcn_mm.openmmlab.config import NoModel, find_config, package_configs
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.changes import Conversion
from wsbcn_mm.openmmlab.conversion.convert import convert_config
from wsbcn_mm.openmmlab.conversion.layers import NothingToConvert
from wsbcn_mm.openmmlab.conversion.write import write_config
from wsbcn_mm.openmmlab.errors import first_line

OUTCOMES = ('converted', 'nothing to convert', 'needs', 'failed')
# A BatchNorm refuses single values, which one image of a small map gives. So does one that stays
# in a converted network, behind a linear layer.
IMAGES, IMAGES_WITH_BATCH_NORM = 1, 2


def upstream_configs(package: str) -> list[str]:
    """Names of all configs outside of _base_ that an installed package ships."""
    folder = package_configs(package)
    files = sorted(folder.rglob('*.py'))
    return [
        f'{package}::{file.relative_to(folder).as_posix()}'
        for file in files
        if '_base_' not in file.relative_to(folder).parts
    ]


def examine(source: str, run: bool = True, written: Path | None = None) -> dict[str, Any]:
    """Converts a config and records what happens, as a dict for JSON.

    Args:
        source: Such as ``mmdet::...``.
        run: Build, initialise, train a step and evaluate the network, original and converted, see
            `trial.try_network`.
        written: Write the config to this file and read it back.

    Returns:
        ``config``, ``outcome`` (see `OUTCOMES`), ``reason``, ``seconds``; for a converted one also
        ``layers`` (numbers of BCN, WS, remaining BN and GN), ``left``, ``findings`` of the audit,
        ``network``, ``read_back`` (True, where it was written), and, where they ran, ``original``
        and ``converted`` with what became of each.
    """
    start = time.perf_counter()
    record: dict[str, Any] = dict(config=source, outcome='failed', reason='')
    try:
        record.update(_examine(source, run, written))
    except NothingToConvert as error:
        record.update(outcome='nothing to convert', reason=first_line(error))
    except Upstream as error:
        reason = f'the original cannot be built here: {reason_of(error.cause)}'
        record.update(outcome='needs', reason=reason)
    except Exception as error:  # noqa: BLE001  recorded, and counted as ours
        record.update(reason=reason_of(error))
    record['seconds'] = round(time.perf_counter() - start, 2)
    return record


class Upstream(Exception):
    """The config as shipped cannot be read or built here; the cause says why."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.cause = cause


def _examine(source: str, run: bool, written: Path | None) -> dict[str, Any]:
    try:
        Config.fromfile(find_config(source)[0])
    except Exception as error:  # a config is a program, and may raise anything
        raise Upstream(error) from error
    try:
        conversion = convert_config(source)
    except probe.CannotBuild as error:
        raise Upstream(error.__cause__ or error) from error
    except NoModel as error:
        raise NothingToConvert('has no model of its own') from error
    record = dict(outcome='converted', **_facts(conversion))
    if written is not None:
        write_config(conversion, written)  # which reads it back
        record['read_back'] = True
    if run:
        record['original'] = try_network(conversion.original, IMAGES_WITH_BATCH_NORM).as_dict()
        images = IMAGES_WITH_BATCH_NORM if record['layers']['bn'] else IMAGES
        record['converted'] = try_network(conversion.cfg, images).as_dict()
    return record


def _facts(conversion: Conversion) -> dict[str, Any]:
    """What can be said without running the network."""
    model = probe.build(conversion.cfg)
    findings = audit_built(conversion.cfg, model)
    return dict(
        layers=_count(model),
        left=conversion.left,
        findings=[f'{f.level} {f.code} {f.where}' for f in findings],
        clean=not has_problems(findings),
        network=network_of(conversion.cfg),
    )


def _count(model: nn.Module) -> dict[str, int]:
    modules = list(model.modules())
    parts = {id(c) for m in modules if isinstance(m, BatchChannelNorm) for c in m.children()}
    return dict(
        bcn=sum(isinstance(m, BatchChannelNorm) for m in modules),
        ws=sum(isinstance(m, WeightStandardized) for m in modules),
        bn=sum(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and id(m) not in parts for m in modules
        ),
        gn=sum(type(m) is nn.GroupNorm for m in modules),
    )


# ---- many, one worker at a time ----------------------------------------------------------------


def work(pipe: Connection) -> None:
    """Examines what comes through a pipe: (name, run, file or None); None ends it."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)  # init_weights tells what it did to every tensor
    # Every `_base_ = 'mmdet::...'` makes mmengine read a hundred metafiles again.
    utils: Any = importlib.import_module('mmengine.config.utils')
    utils.load = functools.cache(utils.load)
    while (job := pipe.recv()) is not None:
        source, run, written = job
        pipe.send(examine(source, run, written))


class Worker:
    """A process that examines one config after another, and may be killed at any time."""

    JOBS = 150  # then a fresh process: hosts keep registries and caches

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def examine(
        self, source: str, run: bool, written: Path | None, timeout: float
    ) -> dict[str, Any]:
        """As the function of that name; a timeout or a crash is recorded as a failure."""
        if self.process is None or self.jobs >= self.JOBS:
            self.start()
        self.jobs += 1
        self.pipe.send((source, run, written))
        reason = f'more than {timeout:.0f} s'
        if self.pipe.poll(timeout):
            try:
                return self.pipe.recv()
            except EOFError:
                reason = 'the process died'
        self.stop()
        return dict(config=source, outcome='failed', reason=reason, seconds=timeout)

    def start(self) -> None:
        """Starts the process; imports of the hosts are part of the first job."""
        self.stop()
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.jobs = 0

    def stop(self) -> None:
        """Kills the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None
