"""Running estimates against the statistics of the data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wsbcn_mm.diagnostics.moments import Moments, as_rows
from wsbcn_mm.layers import BatchChannelNorm, recomputation

DRIFT_MEAN = 0.5
"""A channel drifts if its estimated mean is off by more than this many deviations of the data,"""
DRIFT_STD = 1.5
"""or the estimated deviation by more than this factor, up or down. Both limits are ours."""


@dataclass
class EstimateStatistics:
    """Running statistics of one layer and those of the data that it saw, per channel (C,).

    Attributes:
        running_mean: The layer's estimate of the mean.
        running_std: Likewise ``sqrt(running_var + eps)``: what the layer divides by.
        mean: Mean of the layer's input over all data shown.
        std: Likewise ``sqrt(var + eps)``, biased variance.
    """

    running_mean: Tensor
    running_std: Tensor
    mean: Tensor
    std: Tensor

    @property
    def mean_gap(self) -> Tensor:
        """``|running_mean - mean| / std``: how many deviations the estimated mean is off."""
        return (self.running_mean - self.mean).abs() / self.std

    @property
    def std_ratio(self) -> Tensor:
        """``running_std / std``: 1 where the estimate is right."""
        return self.running_std / self.std

    @property
    def drifts(self) -> Tensor:
        """Which channels are off by more than `DRIFT_MEAN` or `DRIFT_STD`."""
        return (self.mean_gap > DRIFT_MEAN) | (self.std_ratio.log().abs() > math.log(DRIFT_STD))

    @property
    def drift_share(self) -> float:
        """Share of channels whose estimate drifts."""
        return self.drifts.double().mean().item()


class EstimateObserver:
    """Compares running statistics with those of the data shown; a context manager.

    Watches every BatchNorm with running statistics and every Batch-Channel Normalization layer.
    Run the model in evaluation mode to ask what the estimates are worth where they are used (what a
    layer sees then depends on the estimates of the layers before it), in training mode to ask how
    far they lag behind.

    Args:
        model: The model; the passes run under ``with`` are those that count.
    """

    def __init__(self, model: nn.Module) -> None:
        # The layer that is watched, and the one that has its statistics: its child, or itself.
        self._layers: dict[str, tuple[Any, Any]] = {}
        inner: set[nn.Module] = set()
        for name, module in model.named_modules():
            if isinstance(module, BatchChannelNorm):
                self._layers[name] = module, module.bn
                inner.add(module.bn)
            elif (
                isinstance(module, nn.modules.batchnorm._BatchNorm)
                and module not in inner
                and module.running_mean is not None
            ):
                self._layers[name] = module, module
        self._moments: dict[str, Moments] = {}

    def __enter__(self) -> EstimateObserver:
        self._handles = [
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: self._see(name, inputs[0])
            )
            for name, (module, _) in self._layers.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, input: Tensor) -> None:
        if input.numel() > 0 and not recomputation.is_repeated():
            with torch.no_grad():
                self._moments.setdefault(name, Moments()).add(as_rows(input))

    def layers(self) -> dict[str, EstimateStatistics]:
        """Estimates as they are now and statistics of what was shown, of every layer that ran."""
        result = {}
        for name, (module, bn) in self._layers.items():
            if name in self._moments:
                moments = self._moments[name]
                result[name] = EstimateStatistics(
                    running_mean=bn.running_mean.double().cpu().clone(),
                    running_std=(bn.running_var.double() + module.eps).sqrt().cpu(),
                    mean=moments.mean.cpu(),
                    std=(moments.std.square() + module.eps).sqrt().cpu(),
                )
        return result


def estimate_gaps(layers: dict[str, EstimateStatistics]) -> dict[str, float]:
    """The gaps of all layers as one set: means over the layers.

    Args:
        layers: Those of `EstimateObserver.layers`; at least one.

    Returns:
        ``mean_gap`` (deviations of the data), ``std_gap`` (mean of ``|log(std_ratio)|``) and
        ``drift_share``.

    Raises:
        ValueError: no layer.
    """
    if not layers:
        raise ValueError(
            'layers must hold at least one layer with running statistics\n'
            '  got none: did the model run, and has it BatchNorm or BatchChannelNorm?'
        )
    values = list(layers.values())
    return {
        'mean_gap': sum(v.mean_gap.mean().item() for v in values) / len(values),
        'std_gap': sum(v.std_ratio.log().abs().mean().item() for v in values) / len(values),
        'drift_share': sum(v.drift_share for v in values) / len(values),
    }
