"""A config, a model that was built from one, or a checkpoint: all that is wrong with it."""

from __future__ import annotations

import copy
from pathlib import Path

from mmengine.config import Config
from torch import nn

from wsbcn_mm.audit import LEVELS, Finding, audit_model
from wsbcn_mm.openmmlab.audit import checkpoints, layers, recipe
from wsbcn_mm.openmmlab.audit.line import owners
from wsbcn_mm.openmmlab.config import WEIGHTS, find_config, read_config, with_names
from wsbcn_mm.openmmlab.conversion import probe, weights
from wsbcn_mm.openmmlab.conversion.probe import CannotBuild
from wsbcn_mm.openmmlab.conversion.recipe import gpus_to_train_with
from wsbcn_mm.openmmlab.conversion.recipe import images_per_gpu as images_of
from wsbcn_mm.openmmlab.foreign_config import foreign_config
from wsbcn_mm.openmmlab.guarded_loaders import code_refused

CONFIGS = ('.py', '.json', '.yaml', '.yml')


def audit(
    source: str | Path | Config, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """Lists what is wrong with a config or a checkpoint.

    Args:
        source: A config (file, ``mmdet::...`` name or loaded), or a checkpoint (``.pth``, ``.pt``).
        images_per_gpu: As if it were trained with so many; None: what the config says.
        gpus: Number of processes; None: what the file name (``8xb2``) or ``auto_scale_lr`` says,
            else 1.

    Returns:
        Findings, errors first; empty: nothing was found. See `audit_config`, `audit_checkpoint`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a config without a model or with one that cannot be built, a checkpoint that
            cannot be read.
    """
    if not isinstance(source, Config) and _is_checkpoint(Path(source)):
        return audit_checkpoint(source)
    return audit_config(source, images_per_gpu, gpus)


def _is_checkpoint(path: Path) -> bool:
    """Any file that is no config is taken for one: what it is instead is said there."""
    return path.suffix in WEIGHTS or (path.suffix not in CONFIGS and path.is_file())


def audit_checkpoint(path: str | Path) -> list[Finding]:
    """What is wrong with a checkpoint.

    Looked at are the tensors: layers that are not WS + BCN, statistics that never moved or are not
    finite; and, where the checkpoint holds its config (mmengine's do), that config with the formula
    and the freezing that it trained with. Nothing of the file is executed.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or holds no tensors.
    """
    state, meta = weights.read(path)
    findings = weights.findings_of(state, path)
    if isinstance(meta.get('cfg'), str):
        findings += _audit_embedded(meta['cfg'], path)
    return _by_level(findings)


def _audit_embedded(text: str, path: str | Path) -> list[Finding]:
    try:
        cfg = foreign_config(text)
        cfg.load_from = None
        with code_refused(path):  # parts that read weights when they are built
            return audit_config(cfg)
    except (ValueError, ImportError) as error:
        why = f'the config inside of it cannot be audited: {" ".join(str(error).split())}'
        fix = 'audit the file of the config'
        return [Finding('note', 'config', str(path), why, fix)]


def audit_config(
    source: str | Path | Config, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """What is wrong with a config; arguments as in `audit`.

    Codes, beside those of `wsbcn_mm.audit.audit_model`: ``groups`` (do not divide a width),
    ``frozen-random-weights``, ``learning-rate``, ``rate-too-low``, ``long-warm-up``,
    ``schedule-cut-off``, ``weight-decay``, ``formula`` (a checkpoint of another WS formula),
    ``checkpoint`` (of other layers), ``unsynchronised-estimates``.
    """
    if isinstance(source, Config):
        cfg = with_names(copy.deepcopy(source))
    else:
        cfg = read_config(find_config(str(source))[0])
    nodes = probe.nodes(cfg)
    findings = []
    try:
        model = probe.build(cfg)
    except CannotBuild:
        # Groups that do not divide are mended in this copy: it can be built, the rest be found.
        findings = layers.wrong_groups(cfg, nodes)
        if not findings:
            raise
        model = probe.build(cfg)
    return _by_level(findings + audit_built(cfg, model, images_per_gpu, gpus))


def audit_built(
    cfg: Config, model: nn.Module, images_per_gpu: int | None = None, gpus: int | None = None
) -> list[Finding]:
    """As `audit_config`, for a config whose model `probe.build` has built already."""
    nodes = probe.nodes(cfg)
    images = images_per_gpu or images_of(cfg) or 1
    processes = gpus or gpus_to_train_with(cfg) or 1
    if cfg.get('sync_bn') and processes > 1:  # the Runner converts after building
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    owner = owners(model)
    by_where = {node.where: node for node in nodes}
    findings = [
        layers.where_possible(layers.with_config_line(finding, by_where), cfg, by_where)
        for finding in audit_model(model, images, processes, part_of=owner.__getitem__)
    ]
    findings += recipe.frozen(cfg, nodes, model, owner)
    start = recipe.start_of(cfg, nodes, model, owner)
    findings += recipe.learning_rate(cfg, images, gpus, start)
    findings += recipe.short_training(cfg, processes, start)
    findings += recipe.schedule(cfg, processes)
    findings += recipe.weight_decay(cfg, model)
    findings += checkpoints.wrong_checkpoints(cfg, nodes, model, owner)
    findings += recipe.unsynchronised(cfg, model, processes)
    findings += recipe.averaged(cfg, model)
    return _by_level(findings)


def _by_level(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))
