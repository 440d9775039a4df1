"""Measures a trained model on its config's data: what tools/analysis_tools/diagnose.py shows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor

from wsbcn_mm.diagnostics import (
    ActivationObserver,
    ActivationStatistics,
    EstimateObserver,
    EstimateStatistics,
    WeightGradientObserver,
    estimate_gaps,
    singularities,
    smoothness,
)
from wsbcn_mm.layers import BatchChannelNorm
from wsbcn_mm.layers.standardization import standardize_once_per_forward, weights_do_not_change
from wsbcn_mm.networks.layer_kinds import NORMS, is_conv
from wsbcn_mm.openmmlab import checkpoints, config, explain, filling
from wsbcn_mm.openmmlab.data.check import check_datasets
from wsbcn_mm.openmmlab.measure.verdict import Skill, loss_fallen, verdict


def diagnose(
    cfg: Config,
    checkpoint: str,
    images: int = 64,
    train_batches: int = 4,
    step_size: float | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> dict:
    """Runs the model and returns everything as numbers, lists and texts (JSON).

    Args:
        cfg: A config with ``val_dataloader`` and ``train_dataloader``.
        checkpoint: A file that fits it.
        images: How many validation images show activations and estimates.
        train_batches: How many training batches show gradients and smoothness.
        step_size: Learning rate at which smoothness is measured; None: the config's.
        report: Shows progress.

    Returns:
        ``layers`` (how many convs and norms of each type), ``summary`` (one number a measure),
        ``verdict`` (`wsbcn_mm.openmmlab.measure.verdict`), ``activations`` (empty for networks
        without ReLU), ``estimates``, ``gradients`` (by layer) and ``smoothness`` (a list).

    Raises:
        ValueError: the checkpoint leaves tensors unfilled, the config has no such loader, or the
            model is a tracker.
        DataError: the data are not the model's, see `DataCheckHook`.
    """
    for name in ('val_dataloader', 'train_dataloader'):
        if not cfg.get(name):
            raise ValueError(
                f'{cfg.filename or "the config"} has no {name}: activations and estimates are '
                'those of validation images, gradients those of training batches'
            )
    with explain.named(cfg):
        runner = Runner.from_cfg(cfg)
    content = checkpoints.read_checkpoint(checkpoint)
    state = checkpoints.state_dict_of(content, checkpoint)
    filling.load(runner.model, state, content, source=checkpoint)
    config.refuse_tracker(runner.model)
    model = runner.model.eval()
    # What heads and resized batches ask for how far the training is.
    meta = checkpoints.meta_of(content)
    for key in ('iter', 'epoch'):
        runner.message_hub.update_info(key, meta.get(key, 0))
    loader = Runner.build_dataloader(cfg.val_dataloader, seed=0)
    check_datasets(loader.dataset, model)
    shown, skill = 0, Skill()
    seen, estimates = ActivationObserver(model), EstimateObserver(model)
    with torch.no_grad(), weights_do_not_change(model), seen, estimates:
        for batch in loader:
            skill.add(model.val_step(batch))
            shown += len(batch['inputs'])
            report(f'validation images {shown}/{images}')
            if shown >= images:
                break
    activations, gaps = seen.layers(), estimates.layers()
    if step_size is None:
        step_size = cfg.optim_wrapper.optimizer.lr
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    check_datasets(loader.dataset, model, learned=True)
    model.train()
    standardize_once_per_forward(model)
    steps, observer = [], WeightGradientObserver(model)
    for i, batch in enumerate(itertools.islice(loader, train_batches)):
        data = model.data_preprocessor(batch, True)

        def loss(data: dict = data) -> Tensor:
            return model.parse_losses(model(**data, mode='loss'))[0]

        steps.append(smoothness(model, loss, step_size))
        if i == 0:
            with observer:
                loss().backward()
            model.zero_grad()
        report(f'training batches {i + 1}/{train_batches}')
    gradients = observer.layers()

    ratios = [g.ratio for g in gradients.values() if g.ratio is not None]
    summary = dict(
        **(singularities(activations) if activations else {}),
        skill=skill.value(),
        loss_fallen=loss_fallen(content),
        **(estimate_gaps(gaps) if gaps else {}),
        gradient_ratio=sum(ratios) / len(ratios) if ratios else None,
        loss=_mean([s.loss for s in steps]),
        loss_range=_mean([s.loss_range for s in steps]),
        gradient_norm=_mean([s.gradient_norm for s in steps]),
        beta=_mean([s.beta for s in steps]),
    )
    inner = {m.bn for m in model.modules() if isinstance(m, BatchChannelNorm)}
    kinds = [m for m in model.modules() if is_conv(m) or isinstance(m, NORMS)]
    layers = [m for m in kinds if m not in inner]
    return dict(
        verdict=[vars(finding) for finding in verdict(summary)],
        config=cfg.filename,
        checkpoint=checkpoint,
        layers=dict(Counter(type(layer).__name__ for layer in layers)),
        images=shown,
        step_size=step_size,
        summary=summary,
        activations={name: _of_activation(layer) for name, layer in activations.items()},
        estimates={name: _of_estimate(layer) for name, layer in gaps.items()},
        gradients={n: dict(norm=g.norm, bound=g.bound) for n, g in gradients.items()},
        smoothness=[vars(s) for s in steps],
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _list(values: Tensor) -> list[float]:
    return [float(f'{v:.4g}') for v in values.tolist()]


def _of_activation(layer: ActivationStatistics) -> dict:
    return dict(
        samples=layer.num_samples,
        dead_channels=layer.dead_channels,
        stat_spread=layer.stat_spread,
        singularity_distance=layer.singularity_distance,
        sigma_mu=layer.sigma_mu,
        sigma_sigma=layer.sigma_sigma,
        dead_share=_list(layer.dead_share),
        active_share=_list(layer.active_share),
        mean=_list(layer.mean),
        std=_list(layer.std),
    )


def _of_estimate(layer: EstimateStatistics) -> dict:
    return dict(
        drift_share=layer.drift_share,
        mean_gap=_list(layer.mean_gap),
        std_ratio=_list(layer.std_ratio),
    )
