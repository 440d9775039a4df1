"""What is wrong with a model for training with 1-2 images per GPU.

The part that needs torch alone; `wsbcn_mm.openmmlab.audit` adds what only a config
shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.networks.trials import modes_kept
from wsbcn_mm.structure import followers, norms_of_vectors, standardizable

LEVELS = ('error', 'warning', 'note')
OF_VECTORS = 'a LayerNorm there, or more images: BCN is for maps, and conversions leave it alone'
MICRO_BATCH = 2  # images per GPU up to which batch statistics are a problem


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        level: ``'error'``: training suffers or fails; ``'warning'``: it probably does; ``'note'``:
            good to know, and no reason to stop.
        code: A name for the kind of finding, such as ``'batch-statistics'``.
        where: The part of the model, or the key of the config.
        why: What happens because of it.
        fix: What mends it; for configs a line to put there.
    """

    level: str
    code: str
    where: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f'{self.level}: {self.where}: {self.why} [{self.code}]\n    mend: {self.fix}'


def has_problems(findings: list[Finding], strict: bool = False) -> bool:
    """Whether there is an error or a warning; with ``strict`` a note counts too."""
    return any(strict or f.level != 'note' for f in findings)


def audit_model(
    model: nn.Module,
    images_per_gpu: int = 1,
    num_processes: int = 1,
    run: Callable[[], object] | None = None,
    part_of: Callable[[str], str] | None = None,
) -> list[Finding]:
    """Lists what is wrong with a model for micro-batch training.

    The mode of every module is looked at as ``model.train()`` leaves it, and put back: hosts
    override ``train()`` to freeze parts.

    Args:
        model: Any module; not changed.
        images_per_gpu: The batch size of one process.
        num_processes: Over how many SyncBatchNorm would synchronise.
        run: Runs the model once, see `wsbcn_mm.structure.followers`.
        part_of: The part of the model that a module belongs to, by its name; findings are made per
            part. None: the first name, ``backbone`` of ``backbone.layer1.0.conv1``.

    Returns:
        Findings; errors first. Codes: ``batch-statistics``, ``sync-bn-without-processes``,
        ``vector-statistics`` (either of them, behind a linear layer), ``frozen-bn``,
        ``frozen-estimates``, ``ws-without-norm``, ``norm-without-ws``.

    Raises:
        TypeError: not a module.
        ValueError: less than one image or process.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f'model must be a torch.nn.Module\n  got {type(model).__name__}')
    for name, value in (('images_per_gpu', images_per_gpu), ('num_processes', num_processes)):
        if value < 1:
            raise ValueError(f'{name} must be at least 1\n  got {value}')
    part_of = part_of or (lambda name: name.partition('.')[0] or 'model')
    with modes_kept(model):
        model.train()
        hits = list(_norms(model, images_per_gpu, num_processes)) + list(_convs(model, run))
    return _by_part(hits, part_of)


# (level, code, module name, why, fix); hits of one code and part become one finding.
_Hit = tuple[str, str, str, str, str]


def _norms(model: nn.Module, images: int, processes: int) -> Iterator[_Hit]:
    layers = [m for m in model.modules() if isinstance(m, BatchChannelNorm)]
    parts = {id(child) for layer in layers for child in layer.children()}
    vectors = norms_of_vectors(model)
    for name, module in model.named_modules():
        if isinstance(module, BatchChannelNorm):
            yield from _batch_channel_norm(name, module, images * processes)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in parts:
            for level, code, where, why, fix in _batch_norm(name, module, images, processes):
                if name in vectors and code != 'frozen-bn':
                    yield level, 'vector-statistics', where, why, OF_VECTORS
                else:
                    yield level, code, where, why, fix


def _batch_channel_norm(name: str, module: BatchChannelNorm, images: int) -> Iterator[_Hit]:
    fix = 'call train() on the whole layer, without an override that puts its `bn` into eval'
    if module.training and not module.bn.training:
        why = 'the estimates are frozen while the layer trains: they no longer fit the weights'
        yield 'error', 'frozen-estimates', name, why, fix
    elif not module.training and any(p.requires_grad for p in module.parameters()):
        why = 'the layer stays in evaluation mode while its parameters train'
        yield 'error', 'frozen-estimates', name, why, fix
    elif module.training and module.mode == 'batch':
        synchronised = isinstance(module.bn, nn.SyncBatchNorm)
        if images <= MICRO_BATCH or not synchronised:
            why = (
                'BCN in batch mode takes its statistics from one or two images'
                if images <= MICRO_BATCH
                else 'BCN in batch mode takes its statistics from the images of one process'
            )
            level = 'error' if images <= MICRO_BATCH else 'warning'
            yield level, 'batch-statistics', name, why, "mode='estimate', the default"


def _batch_norm(name: str, module: nn.Module, images: int, processes: int) -> Iterator[_Hit]:
    fix = 'wsbcn_mm.convert.convert_model(model)'
    if not module.training:
        why = 'BatchNorm is frozen: it normalises with the statistics of another data set'
        yield 'note', 'frozen-bn', name, why, fix
    elif isinstance(module, nn.SyncBatchNorm) and processes > 1:
        if images * processes <= MICRO_BATCH:
            why = f'SyncBatchNorm sees {images * processes} images in all'
            yield 'error', 'batch-statistics', name, why, fix
    elif isinstance(module, nn.SyncBatchNorm):
        level = 'error' if images <= MICRO_BATCH else 'warning'
        why = (
            f'SyncBatchNorm in a single process is a BatchNorm over {images} '
            f'image{"s" * (images > 1)}'
        )
        yield level, 'sync-bn-without-processes', name, why, fix
    elif images <= MICRO_BATCH:
        why = f'BatchNorm takes its statistics from {images} image{"s" * (images > 1)}'
        yield 'error', 'batch-statistics', name, why, fix


def _convs(model: nn.Module, run: Callable[[], object] | None) -> Iterator[_Hit]:
    modules = dict(model.named_modules(remove_duplicate=False))
    for follower in followers(model, run):
        name, standardized = follower.names[0], isinstance(follower.conv, WeightStandardized)
        if standardized and follower.unnormalised:
            fan_in = follower.conv.weight[0].numel()
            why = (
                'a WS convolution without a norm behind it: its output is about '
                f'sqrt(fan-in) = {fan_in**0.5:.0f} times larger, layer after layer'
            )
            yield 'error', 'ws-without-norm', name, why, 'a plain convolution, or a norm behind it'
        elif (
            not standardized
            and follower.normalised
            and any(isinstance(modules[n], nn.GroupNorm) for n in follower.norms)
            and type(follower.conv).__name__ != 'ConvWS2d'
            and standardizable(follower.conv)
        ):
            why = 'a norm of single samples behind a plain convolution: WS is what makes up for it'
            yield 'note', 'norm-without-ws', name, why, 'wsbcn_mm.convert.convert_model(model)'


def _by_part(hits: list[_Hit], part_of: Callable[[str], str]) -> list[Finding]:
    groups: dict[tuple[str, str, str], list[tuple[str, str, str]]] = {}
    for level, code, name, why, fix in hits:
        # The text of the first stands for all: numbers in it may differ.
        groups.setdefault((level, code, part_of(name)), []).append((name, why, fix))
    findings = []
    for (level, code, part), members in groups.items():
        name, why, fix = members[0]
        many = f'{len(members)} layers, first {name}' if len(members) > 1 else name
        where = part if name == part else f'{part} ({many})'
        findings.append(Finding(level, code, where, why, fix))
    return sorted(findings, key=lambda f: LEVELS.index(f.level))
