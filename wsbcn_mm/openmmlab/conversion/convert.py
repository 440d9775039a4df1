"""Turns a config of an OpenMMLab host into one that trains with WS + BCN.

The architecture stays: BN, SyncBN and GN become BCN where they stand, and the convolutions in front
of them become WSConv2d. What has no norm (RPN, FPN and towers of many detectors) stays plain. The
result is checked by building it: a part whose constructor would also standardize convolutions
without a norm behind them keeps plain ones.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from wsbcn_mm.openmmlab.checkpoints import meta_of, read_checkpoint
from wsbcn_mm.openmmlab.config import find_config, imports_of, read_config, with_names
from wsbcn_mm.openmmlab.conversion import backbone as backbones
from wsbcn_mm.openmmlab.conversion import length, probe, recipe, rescaling, schedulers
from wsbcn_mm.openmmlab.conversion.changes import Conversion
from wsbcn_mm.openmmlab.conversion.layers import convert_layers
from wsbcn_mm.openmmlab.conversion.options import checked_options
from wsbcn_mm.openmmlab.conversion.probe import Node
from wsbcn_mm.openmmlab.places import Place, dotted, value_at
from wsbcn_mm.openmmlab.registry import ESTIMATES_HOOK


def convert_config(source: str | Path | Config, **choices: Any) -> Conversion:
    """The WS + BCN version of a config.

    - ``norm_cfg``: BN, SyncBN and GN become BCN, also where the norm is a default that the config
      does not show; 32 groups where they fit every width of the part, ``'auto'`` elsewhere.
    - ``conv_cfg``: WSConv2d where all convolutions that it reaches have a norm behind them.
    - ``norm_eval=False`` (and of MMAction2 ``partial_bn``, ``bn_frozen``), and ``frozen_stages=-1``
      unless a checkpoint is given: frozen random weights and frozen estimates cannot learn.
    - ``batch_size`` is set; the learning rate and the schedulers' own rates follow by the linear
      rule down to what was measured at one image (`rates.least_rate`), ``auto_scale_lr`` with
      them, and all iterations that are counted, so that training sees as many images as before.
      Norms get no weight decay, detectors from scratch clipped gradients.
    - `EstimatesHook` joins the custom hooks.
    - Checkpoints of the parts that changed are dropped: they hold weights of other layers. A
      backbone that was pretrained with BatchNorm is kept as it is (``backbone``).

    Args:
        source: A file, a name such as ``'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'``, or
            a loaded config (not changed).
        **choices: Which layers, weights and batch it is to have: the attributes of
            `ConversionOptions`, which checks them.

    Raises:
        TypeError: an unknown choice, or a value of another type; a config that is a plain dict.
        FileNotFoundError: no such config; names similar ones.
        CannotBuild: a ValueError; the config needs something that is missing here.
        NoModel: a ValueError; a config without a model.
        NothingToConvert: a ValueError; nothing in the config has a norm that BCN could replace.
        ValueError: a checkpoint and a backbone that do not go together; see `backbone.settle`.
    """
    options = checked_options(choices)
    if isinstance(source, dict):
        raise TypeError(
            'a config must be a file, its name, or a Config\n  got a dict: Config(...) makes one'
        )
    if isinstance(source, Config):
        original, file, base = with_names(copy.deepcopy(source)), source.filename, None
    else:
        file, base = find_config(str(source))
        original = read_config(file)
    conversion = Conversion(copy.deepcopy(original), file and str(file), base, original)
    kept = backbones.BACKBONE if backbones.settle(conversion, options) else None
    converted = convert_layers(conversion, options, kept)
    _unfreeze(conversion, converted, options.checkpoint)
    _replace_checkpoints(conversion, converted, options.checkpoint, kept)
    start = 'scratch' if options.checkpoint is None and kept is None else 'pretrained'
    settings, warnings = rescaling.rescaled(conversion.cfg, options, start)
    conversion.warnings += warnings
    settings += rescaling.clipping(conversion.cfg, start)
    for setting in (*settings, *recipe.no_decay_of_norms(conversion.cfg)):
        conversion.set(setting.place, setting.value, setting.why)
    _shorten_warm_up(conversion, options.gpus or recipe.gpus_of_rate(conversion.cfg) or 1)
    if options.norm == 'BCN' and not recipe.has_estimates_hook(conversion.cfg):
        why = 'the same estimates on all ranks; their rate by images per step'
        hooks = conversion.cfg.get('custom_hooks') or []
        conversion.set(('custom_hooks',), [*hooks, ConfigDict(type=ESTIMATES_HOOK)], why)
    _import_this_package(conversion)
    return conversion


def _shorten_warm_up(conversion: Conversion, gpus: int) -> None:
    """A warm-up made for COCO is most of a training on a few images."""
    found = schedulers.long_warm_up(conversion.cfg, length.iterations(conversion.cfg, gpus))
    if found is not None:
        why = f'the rate would still rise when half of the {found.count} iterations are over'
        conversion.set(found.place, found.better, why)


def _import_this_package(conversion: Conversion) -> None:
    imports = imports_of(conversion.cfg)
    if 'wsbcn_mm' not in imports:
        value = dict(imports=[*imports, 'wsbcn_mm'], allow_failed_imports=False)
        conversion.set(('custom_imports',), value)


# ---- freezing and checkpoints ------------------------------------------------------------------


def _unfreeze(conversion: Conversion, converted: list[Node], checkpoint: str | None) -> None:
    for node in converted:
        for key in recipe.frozen_norms(node):
            conversion.set((*node.path, key), False, 'True freezes the estimates')
        if recipe.frozen_stages(node) is not None and checkpoint is None:
            place, why = (*node.path, 'frozen_stages'), 'random weights must not be frozen'
            conversion.set(place, recipe.nothing_frozen(node), why)


def _replace_checkpoints(
    conversion: Conversion, converted: list[Node], checkpoint: str | None, kept: Place | None
) -> None:
    """Drops what holds weights of other layers; ``checkpoint`` takes the place of the first."""
    cfg, dropped = conversion.cfg, []
    places = [node.path for node in converted]
    target: Place | None = None  # of the checkpoint that was given
    for node in probe.nodes(cfg):
        # The part itself changed, or a part of it did (a Pretrained init_cfg of a whole model).
        if not any(place[: len(node.path)] == node.path for place in places):
            continue
        init = recipe.pretrained_init(node)
        if init is not None:
            dropped.append(init)
            new = None
            if checkpoint is not None and target is None and node.path in places:
                new, target = dict(type='Pretrained', checkpoint=checkpoint), node.path
            layers = 'GN + WS' if 'gn_ws' in init else 'other layers'
            conversion.set((*node.path, 'init_cfg'), new, f'was for {layers}')
        pretrained = recipe.pretrained_argument(node)
        # What a segmenter has of its own goes to its backbone.
        if pretrained is not None and not (kept is not None and node.path == kept[:-1]):
            dropped.append(pretrained)
            conversion.set((*node.path, 'pretrained'), None, 'weights of other layers')
        if (init is not None or pretrained is not None) and node.get('pretrained2d'):
            # MMAction2 would look for the weights of a 2d network, without a file.
            conversion.set((*node.path, 'pretrained2d'), False, 'no checkpoint of 2d layers')
    if checkpoint is not None:
        if target is None:
            target = next((place for place in places if place[-1] == 'backbone'), None)
            if target is None:
                raise ValueError('checkpoint: the config has no converted backbone to load it into')
            conversion.set((*target, 'init_cfg'), dict(type='Pretrained', checkpoint=checkpoint))
        _fit_checkpoint(conversion, target, checkpoint)
    if cfg.get('load_from'):
        dropped.append(cfg.load_from)
        conversion.set(('load_from',), None, 'weights of other layers')
    for name in dict.fromkeys(dropped):
        instead = (
            f'{checkpoint} takes its place'
            if checkpoint
            else 'training starts from random weights, which needs a longer schedule (6x on COCO); '
            'give --checkpoint with weights of WS + BCN layers '
            '(tools/model_converters/convert_checkpoint.py makes them)'
        )
        conversion.warnings.append(f'checkpoint {name} dropped: {instead}')


def _fit_checkpoint(conversion: Conversion, place: Place, checkpoint: str) -> None:
    """Formula and affine of the part that a checkpoint is for, as the checkpoint records them."""
    if not Path(checkpoint).is_file():
        conversion.warnings.append(
            f'{checkpoint} is not here: the WS formula and the affine of its layers are not known '
            'and were not set; tools/analysis_tools/audit.py tells where they differ'
        )
        return
    meta = meta_of(read_checkpoint(checkpoint))
    part = value_at(conversion.cfg, place)
    for key, holder, default in (
        ('formula', 'conv_cfg', 'paper'),
        ('affine', 'norm_cfg', 'group'),
    ):
        value = meta.get(key) or default
        if isinstance(part.get(holder), dict):
            if part[holder].get(key, default) != value:
                conversion.set((*place, holder, key), value, f'that of {checkpoint}')
        elif value != default:
            conversion.warnings.append(
                f'{checkpoint} is for {key}={value!r}, and {dotted(place)} has no {holder} to say '
                'so'
            )
