"""From config and checkpoint to files that stock OpenMMLab loads, compared before they are written.

What is written is `stock.stock_model`. It, what `wsbcn_mm.fold` gives, and what mmcv's own
``fuse_conv_bn`` makes of it must compute what the trained model computes.
"""

import copy
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from wsbcn_mm.openmmlab.checkpoints import BY_LABEL, meta_of
from wsbcn_mm.openmmlab.deploy import stock
from wsbcn_mm.openmmlab.deploy.inference import PlannedModel, preprocess
from wsbcn_mm.openmmlab.deploy.parts import relative_error, tensor_parts

METRICS_TOLERANCE = 1e-3
TOLERANCE = 1e-5  # where none is given; a network that rounds more by itself may have more
EXACT = 1e-10  # what folding may change in float64
ROUNDING = 2.0  # a folded model may be so many times further from float64 than the trained one
META_KEPT = ('dataset_meta', BY_LABEL, 'epoch', 'iter')  # the config is that of the new model


class FoldingDiffers(ValueError):
    """A folded model does not compute what the trained one does."""


def write_folded(
    planned: PlannedModel,
    checkpoint: str,
    output: Path,
    stem: str,
    images: Mapping[str, np.ndarray],
    tolerance: float | None,
    evaluate: bool,
) -> list[Path]:
    """Folds, compares, writes; prints what it finds.

    Args:
        planned: The trained model.
        checkpoint: Its file, for the evaluation.
        output: The folder to write to.
        stem: Name of the files, without suffix.
        images: BGR images to compare on, by name.
        tolerance: Largest error allowed, relative to the largest value. None: 1e-5, or more where
            folding is exact in float64 and the folded model is about as near to float64 as the
            trained one is.
        evaluate: Evaluate both on the config's test data first.

    Returns:
        The files: weights, config and, where layers are listed, the module that puts them in.

    Raises:
        FoldingDiffers: results or metrics are not the same; nothing was written.
        CannotBePlain: a ValueError; something has no equal among stock layers.
    """
    stock_cfg, stock_model = stock.stock_model(planned.cfg, planned.model, planned.plan)
    candidates = {'written': stock_model, 'wsbcn_mm.fold': planned.folded()}
    if stock.lists_layers(stock_cfg):
        print(f'{len(stock_cfg.model.layers)} layers differ from those of any stock config')
    else:
        candidates['written, after fuse_conv_bn'] = fuse_conv_bn(copy.deepcopy(stock_model))
    for name, image in images.items():
        _compare(planned, candidates, name, image, tolerance)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix='.') as folder:
        weights = Path(folder) / f'{stem}.pth'
        meta = {k: v for k, v in meta_of(planned.checkpoint).items() if k in META_KEPT}
        meta['cfg'] = stock_cfg.pretty_text
        torch.save(dict(meta=meta, state_dict=stock_model.state_dict()), weights)
        files = [weights, *stock.write_config(stock_cfg, Path(folder) / f'{stem}.py')]
        if evaluate:
            before = _metrics(planned.cfg, checkpoint, f'{folder}/original')
            after = _metrics(Config.fromfile(files[1]), str(weights), f'{folder}/folded')
            compare_metrics(before, after)
        for file in files:
            os.replace(file, output / file.name)
    return [output / file.name for file in files]


def _compare(
    planned: PlannedModel,
    candidates: Mapping[str, nn.Module],
    name: str,
    image: np.ndarray,
    tolerance: float | None,
) -> None:
    x = preprocess(planned.model, planned.cfg, image)
    parts = tensor_parts(planned.model, x)
    print(f'{name}, {image.shape[-3]}x{image.shape[-2]}: {", ".join(p.name for p in parts)}')
    others = {kind: tensor_parts(candidate, x) for kind, candidate in candidates.items()}
    errors = {kind: relative_error(parts, other) for kind, other in others.items()}
    for kind, error in errors.items():
        print(f'  {kind}: largest relative error {error:.2g}')
    bound = TOLERANCE if tolerance is None else tolerance
    if all(error <= bound for error in errors.values()):
        return
    # Is it more than float32 itself is away from float64?
    double = copy.deepcopy(planned.model).double()
    exact = tensor_parts(double, x.double())
    folding = relative_error(exact, tensor_parts(planned.plan.apply(double), x.double()))
    own = relative_error(exact, parts)
    print(f'  in float64 folding changes {folding:.2g}; float32 itself is off by {own:.2g}')
    for kind, other in others.items():
        error = relative_error(exact, other)
        rounds = tolerance is None and folding <= EXACT and error <= ROUNDING * own
        if not (errors[kind] <= bound or rounds):
            raise FoldingDiffers(
                f'{kind} differs from the original by {errors[kind]:.2g}, more than {bound:.2g}; '
                f'nothing was written\n  in float64 folding changes {folding:.2g}: where that is '
                f'below {EXACT:.0e}, the rest is the rounding of float32 (from float64 the '
                f'original is {own:.2g} away, {kind} {error:.2g}), and --tolerance allows more'
            )


def _metrics(cfg: Config, checkpoint: str, folder: str) -> dict[str, Any]:
    """Metrics of a checkpoint on the config's test data."""
    cfg = copy.deepcopy(cfg)
    cfg.load_from, cfg.work_dir, cfg.launcher = checkpoint, folder, 'none'
    cfg.log_level = 'WARNING'  # not the whole config, twice
    return Runner.from_cfg(cfg).test()


def compare_metrics(before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Prints a table of the metrics of the original and the folded model.

    Where nothing is detected, mmdet has no metrics at all.

    Raises:
        FoldingDiffers: a metric moved, or one of the two has none.
    """
    if not before and not after:
        print('neither model detects anything in the test data: there are no metrics to compare')
        return
    width = max(map(len, {**before, **after}))
    print(f'{"":<{width}}  original   folded')
    for name in {**before, **after}:
        values = [metrics.get(name, math.nan) for metrics in (before, after)]
        print(f'{name:<{width}}  {values[0]:8.4f} {values[1]:8.4f}')
    if before.keys() != after.keys():
        finds, none = ('original', 'folded') if before else ('folded', 'original')
        raise FoldingDiffers(
            f'the {finds} model has metrics that the {none} one has not (it detects nothing); '
            'nothing was written'
        )
    difference = max(abs(value - after[name]) for name, value in before.items())
    if not difference <= METRICS_TOLERANCE * max(1.0, *map(abs, before.values())):
        raise FoldingDiffers(f'metrics differ by {difference:.4f}; nothing was written')
