"""Elimination singularities: what every ReLU of a model is given."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wsbcn_mm.diagnostics.moments import Moments, as_rows
from wsbcn_mm.layers import recomputation

RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


@dataclass
class ActivationStatistics:
    """What one ReLU saw, per channel (C,), over all samples shown. Plain tensors on the CPU.

    Attributes:
        dead_share: Share of samples for which the channel's output is zero everywhere.
        active_share: Share of all values (samples and positions) that are above zero.
        mean: Mean of the input of the ReLU (the pre-activation).
        std: Standard deviation of the same.
        num_samples: How many samples were shown.
    """

    dead_share: Tensor
    active_share: Tensor
    mean: Tensor
    std: Tensor
    num_samples: int

    @property
    def dead_channels(self) -> float:
        """Share of channels that no sample switched on: dead_share = 1."""
        return (self.dead_share == 1).double().mean().item()

    @property
    def sigma_mu(self) -> float:
        """Spread of the means: standard deviation over channels (1911.09738 plots it)."""
        return self.mean.std(unbiased=False).item()

    @property
    def sigma_sigma(self) -> float:
        """Spread of the deviations: standard deviation over channels (likewise)."""
        return self.std.std(unbiased=False).item()

    @property
    def stat_spread(self) -> float:
        """Ours: ``sqrt(sigma_mu² + sigma_sigma²) / rms``, rms that of all pre-activations.

        0 where all channels have the same mean and deviation, as behind a BatchNorm without affine;
        the scale of the layer cancels. The papers' "StatDiff" is of this kind, its formula unknown.
        """
        rms = (self.mean.square() + self.std.square()).mean().sqrt().item()
        return math.hypot(self.sigma_mu, self.sigma_sigma) / rms if rms > 0 else 0.0

    @property
    def singularity_distance(self) -> float:
        """Ours: mean over channels of ``min(1, 2 active_share)``, in [0, 1].

        1: every channel is on at half of the values or more, as behind a BatchNorm at its start.
        0: every channel is off for good, an elimination singularity.
        """
        return (2 * self.active_share).clamp(max=1).mean().item()


class ActivationObserver:
    """Watches the input of every ReLU of a model; a context manager.

    ReLUs are found where they are called, as a module (`torch.nn.ReLU`), as a function or as a
    tensor's method. A ReLU is named by the innermost module that calls it, and by the number of the
    call where that module calls several in one forward pass: ``layer1.0.relu (2)``. Other
    activations are not watched, nor is anything inside torch.compile. What activation checkpointing
    runs again counts once.

    Args:
        model: The model; the passes run under ``with`` are those that count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._samples: Counter[str] = Counter()
        self._dead: dict[str, Tensor] = {}
        self._active: dict[str, Tensor] = {}
        self._moments: dict[str, Moments] = {}
        self._calls: Counter[str] = Counter()
        self._stack: list[str] = []

    def __enter__(self) -> ActivationObserver:
        self._handles = []
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._enter_module(name)),
                module.register_forward_hook(lambda *_: self._leave_module(), always_call=True),
            ]
        self._mode = _ReluMode(self._see)
        self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()

    def _enter_module(self, name: str) -> None:
        if name == '':
            self._calls.clear()
        self._stack.append(name)

    def _leave_module(self) -> None:
        self._stack.pop()

    def _see(self, input: Tensor) -> None:
        if input.dim() < 2 or input.numel() == 0 or recomputation.is_repeated():
            return
        module = self._stack[-1] if self._stack else ''
        self._calls[module] += 1
        name = f'{module} ({self._calls[module]})'
        x = as_rows(input)
        dead, active = (x <= 0).all(2).sum(0), (x > 0).sum((0, 2))
        if name not in self._moments:
            self._moments[name] = Moments()
            self._dead[name], self._active[name] = dead, active
        else:
            self._dead[name] += dead
            self._active[name] += active
        self._samples[name] += x.size(0)
        self._moments[name].add(x)

    def layers(self) -> dict[str, ActivationStatistics]:
        """The statistics of every ReLU that ran, in the order of its first call."""
        once = Counter(name.rpartition(' ')[0] for name in self._moments)
        result = {}
        for name, moments in self._moments.items():
            module = name.rpartition(' ')[0]
            samples = self._samples[name]
            result[module if once[module] == 1 else name] = ActivationStatistics(
                dead_share=(self._dead[name].double() / samples).cpu(),
                active_share=(self._active[name].double() / moments.count).cpu(),
                mean=moments.mean.cpu(),
                std=moments.std.cpu(),
                num_samples=samples,
            )
        return result


class _ReluMode(TorchFunctionMode):
    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in RELUS:
            with torch.no_grad():
                self._see(args[0] if args else kwargs['input'])
        return func(*args, **kwargs)


def singularities(layers: dict[str, ActivationStatistics]) -> dict[str, float]:
    """The numbers of all layers as one set: means over the layers.

    Args:
        layers: Those of `ActivationObserver.layers`; at least one.

    Returns:
        ``dead_channels``, ``stat_spread``, ``singularity_distance``, ``sigma_mu`` and
        ``sigma_sigma``.

    Raises:
        ValueError: no layer.
    """
    if not layers:
        raise ValueError('layers must hold at least one ReLU\n  got none: did the model run?')
    names = ('dead_channels', 'stat_spread', 'singularity_distance', 'sigma_mu', 'sigma_sigma')
    return {
        name: sum(getattr(layer, name) for layer in layers.values()) / len(layers) for name in names
    }
