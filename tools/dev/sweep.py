"""Converts one upstream config and sees what comes of it: built, audited, run forward, read back.

`examine` is what tools/dev/sweep_upstream.py calls for every config that the installed
mmdet and mmseg ship, and what a sample of them goes through in the tests.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import multiprocessing
import re
import time
import warnings
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from wsbcn_mm.audit import has_problems
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.openmmlab.config import find_config, package_configs
from wsbcn_mm.openmmlab.conversion import convert as convert_config
from wsbcn_mm.openmmlab.conversion import probe
from wsbcn_mm.openmmlab.conversion.audit import audit_built
from wsbcn_mm.openmmlab.errors import first_line
from wsbcn_mm.structure import is_norm, trace

# What a config may need beside the installed packages, by what the message of its failure holds.
NEEDS = {
    'mmpretrain': ('mmpretrain',),
    'timm': ('timm',),
    'transformers': ('transformers',),
    'a file of its own (a teacher, an embedding)': ('No such file', 'does not exist', 'not found'),
    'a download': ('HTTP', 'urlopen', 'Connection', 'resolve', 'Name or service', 'download'),
}
SIZES = (64, 256, 512)  # pixels of the image of a run: the next where one is too small
DONE = ('converted', 'all but DCN')
OUTCOMES = (*DONE, 'nothing to convert', 'refused', 'needs', 'failed')


def upstream_configs(package: str) -> list[str]:
    """Names of all configs outside of _base_ that an installed package ships."""
    folder = package_configs(package)
    files = sorted(folder.rglob('*.py'))
    return [
        f'{package}::{file.relative_to(folder).as_posix()}'
        for file in files
        if '_base_' not in file.relative_to(folder).parts
    ]


def examine(source: str, forward: bool = True, written: Path | None = None) -> dict:
    """Converts a config and records what happens, as a dict for JSON.

    Args:
        source: ``mmdet::...`` or ``mmseg::...``.
        forward: Run the converted model once, see `run_once`.
        written: Write the config to this file and read it back.

    Returns:
        ``config``, ``outcome`` (see `OUTCOMES`), ``reason``, ``seconds``; for a converted one also
        ``layers`` (numbers of BCN, WS, remaining BN and plain conv -> norm pairs), ``left``,
        ``findings`` of the audit, ``read_back`` (True, where it was written) and what `run_once`
        returns; where the whole did not run, ``original`` tells what ran of the model as shipped.
    """
    start = time.perf_counter()
    record = dict(config=source, outcome='failed', reason='')
    try:
        record.update(_examine(source, forward, written))
    except convert_config.NothingToConvert as error:
        record.update(outcome='nothing to convert', reason=_first_line(error))
    except Upstream as error:
        record.update(_upstream(error.__cause__))
    except Exception as error:  # noqa: BLE001  recorded, and counted as ours
        record.update(reason=f'{type(error).__name__}: {_first_line(error)}')
    record['seconds'] = round(time.perf_counter() - start, 2)
    return record


class Upstream(Exception):
    """The config as shipped cannot be read or built here; the cause says why."""


def _examine(source: str, forward: bool, written: Path | None) -> dict:
    try:
        Config.fromfile(find_config(source)[0])
    except Exception as error:
        raise Upstream from error
    outcome, reason = 'converted', ''
    try:
        conversion = convert_config.convert_config(source)
    except convert_config.UnsupportedConfig as error:
        outcome, reason = 'all but DCN', _first_line(error)
        conversion = convert_config.convert_config(source, keep_dcn=True)
    except probe.CannotBuild as error:
        raise Upstream from error.__cause__
    except convert_config.NothingToConvert:
        raise
    except ValueError as error:
        if 'has no model' in str(error):
            raise convert_config.NothingToConvert('has no model of its own') from None
        raise
    if written is not None:
        convert_config.write_config(conversion, written)
    cfg = conversion.cfg
    _few_proposals(cfg.model)
    model = probe.build(cfg)
    findings = audit_built(cfg, model)
    record = dict(
        outcome=outcome,
        reason=reason,
        layers=_count(model),
        left=conversion.left,
        findings=[f'{f.level} {f.code} {f.where}' for f in findings],
        clean=not has_problems(findings),
        model=_fingerprint(cfg),
    )
    if written is not None:
        record['read_back'] = True
    if forward:
        record.update(run_once(model, cfg))
        if record['forward'] != 'whole':
            original = conversion.original
            _few_proposals(original.model)
            ran = run_once(probe.build(original), original)
            record['original'] = ran['forward']
    return record


def _upstream(error: BaseException) -> dict:
    text = f'{type(error).__name__}: {_first_line(error)}'
    for needed, words in NEEDS.items():
        if any(word in text for word in words):
            return dict(outcome='needs', reason=f'{needed}: {text}')
    return dict(outcome='needs', reason=f'the original cannot be built here: {text}')


def _first_line(error: BaseException) -> str:
    line = ' '.join(first_line(error).split())
    line = re.sub(r'/\S*/site-packages/', '', line)  # not where this machine keeps them
    return re.sub(r'(?<![\w./:])/(?:[^\s/]+/)+', '', line)[:200]


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


# What a config may say differently without changing which layers are built.
NOT_STRUCTURE = (
    'num_classes',
    'test_cfg',
    'train_cfg',
    'data_preprocessor',
    'init_cfg',
    'pretrained',
    '_scope_',
)


def _fingerprint(cfg: Config) -> str:
    """The same for models of the same layers; losses, classes and thresholds do not matter."""

    def structure(value):
        if isinstance(value, dict):
            return {
                k: structure(v)
                for k, v in value.items()
                if k not in NOT_STRUCTURE and not str(k).startswith('loss')
            }
        return [structure(v) for v in value] if isinstance(value, (list, tuple)) else value

    text = json.dumps(structure(cfg.model.to_dict()), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _few_proposals(value: object) -> None:
    """Eight proposals instead of a thousand: the heads of detectors run once for each."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key == 'rpn' and isinstance(item, dict) and 'max_per_img' in item:
                item['max_per_img'] = item['nms_pre'] = 8
            _few_proposals(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _few_proposals(item)


# ---- one run -----------------------------------------------------------------------------------


def run_once(model: nn.Module, cfg: Config) -> dict:
    """Runs a model from `probe.build` once, and looks at what follows its WS convolutions.

    The whole network where it can be called so (mode ``'tensor'``), else backbone and neck; with an
    image of 64 pixels, else of the size that its backbone is made for, or of more. In training
    mode: estimates move, and nothing is taken from running statistics of nothing; but BatchNorms,
    which a network as shipped has, are in evaluation: they refuse single values.

    Returns:
        ``forward``: ``'whole'``, ``'features'`` or ``''``; ``why`` it was not the whole; ``size``:
        of the image; ``bare``: names of WS convolutions that something else than a norm read.
    """
    _fill(model)
    names = {id(module): name for name, module in model.named_modules()}
    modules = {id(module): module for module in model.modules()}
    model.train()
    ours = {
        id(part)
        for module in modules.values()
        if isinstance(module, BatchChannelNorm)
        for part in module.children()
    }
    for key, module in modules.items():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and key not in ours:
            module.eval()
    channels = (cfg.model.get('backbone') or {}).get('in_channels', 3)
    why = ''
    for kind in ('whole', 'features'):
        for size in _sizes(cfg):
            image = torch.randn(1, channels, size, size)
            try:
                with (
                    DefaultScope.overwrite_default_scope(cfg.get('default_scope')),
                    torch.no_grad(),
                ):
                    seen = trace(model, lambda: _run(kind, model, cfg, image))  # noqa: B023
            except Exception as error:  # noqa: BLE001  what cannot run so is recorded
                if kind == 'whole':
                    why = f'{type(error).__name__}: {_first_line(error)}'
                continue
            bare = [
                names[key]
                for key, (norms, others) in seen.items()
                if isinstance(modules[key], WeightStandardized) and (others or not norms)
            ]
            return dict(forward=kind, why=why * (kind != 'whole'), size=size, bare=bare)
    return dict(forward='', why=why, size=size, bare=[])


def _run(kind: str, model: nn.Module, cfg: Config, image: Tensor) -> object:
    if kind == 'whole':
        return model(image, _samples(cfg, image), mode='tensor')
    model = getattr(model, 'detector', model)  # of one that tracks
    return model.extract_feat(image) if hasattr(model, 'extract_feat') else model.backbone(image)


def _sizes(cfg: Config) -> list[int]:
    """Those to try; a vision transformer may know positions of one size alone."""
    own = (cfg.model.get('backbone') or {}).get('img_size')
    own = own[0] if isinstance(own, (list, tuple)) else own
    return [SIZES[0], own] if own else list(SIZES)


# ---- many, one worker at a time ----------------------------------------------------------------


def work(pipe) -> None:
    """Examines what comes through a pipe: (name, forward, file or None); None ends it."""
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    # Every `_base_ = 'mmdet::...'` makes mmengine read a hundred metafiles again.
    utils = importlib.import_module('mmengine.config.utils')
    utils.load = functools.cache(utils.load)
    while (job := pipe.recv()) is not None:
        source, forward, written = job
        pipe.send(examine(source, forward, written))


class Worker:
    """A process that examines one config after another, and may be killed at any time."""

    JOBS = 150  # then a fresh process: hosts keep registries and caches

    def __init__(self) -> None:
        self.process = None

    def examine(self, source: str, forward: bool, written: Path | None, timeout: float) -> dict:
        """As the function of that name; a timeout or a crash is recorded as a failure."""
        if self.process is None or self.jobs >= self.JOBS:
            self.start()
        self.jobs += 1
        self.pipe.send((source, forward, written))
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


def _samples(cfg: Config, image: Tensor) -> list | None:
    if cfg.get('default_scope') != 'mmdet':
        return None
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    shape = tuple(image.shape[2:])
    meta = dict(
        img_shape=shape,
        ori_shape=shape,
        pad_shape=shape,
        batch_input_shape=shape,
        scale_factor=(1.0, 1.0),
        img_id=0,
    )
    sample = DetDataSample(metainfo=meta)
    # An object for queries that are made of it, a proposal for detectors that find none.
    box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
    sample.gt_instances = InstanceData(bboxes=box, labels=torch.zeros(1, dtype=torch.long))
    sample.proposals = InstanceData(bboxes=box)
    return [sample]


def _fill(model: nn.Module) -> None:
    """Small random weights in a model that was built without any."""
    with torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is None:
                    continue
                if p.dim() > 1:
                    p.normal_(std=0.02)
                else:
                    p.fill_(float(is_norm(module) and name in ('weight', 'batch_weight')))
