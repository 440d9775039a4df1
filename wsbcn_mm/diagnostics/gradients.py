"""Gradients of raw weights against the bound that WS gives, and smoothness of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized
from wsbcn_mm.networks.layer_kinds import is_conv


@dataclass
class WeightGradient:
    """The gradient of one convolution's raw weight.

    Attributes:
        norm: ``|dL/dw|``, Euclidean.
        bound: With WS, ``sqrt(sum_o |dL/dw_hat_o|² / d_o²)``, d_o the denominator of filter o: WS
            takes the directions of the mean and of the weight itself out of the gradient, so that
            ``norm <= bound`` (1903.10520, section 3.3). None for a convolution without WS.
    """

    norm: float
    bound: float | None

    @property
    def ratio(self) -> float | None:
        """``norm / bound``, at most 1; None without WS or without gradient."""
        return self.norm / self.bound if self.bound else None


class WeightGradientObserver:
    """Watches the gradients of convolution weights; a context manager.

    Several backward passes add up, as in ``weight.grad``; an optimizer step between them makes the
    bound meaningless. `wsbcn_mm.layers.comparators` count as convolutions without WS.

    Args:
        model: The model; forward and backward passes under ``with`` are those that count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._convs = {
            name: module
            for name, module in model.named_modules()
            if is_conv(module) and module.weight.requires_grad
        }
        self._raw: dict[str, Tensor] = {}
        self._standardized: dict[str, Tensor] = {}

    def __enter__(self) -> WeightGradientObserver:
        self._handles = []
        for name, module in self._convs.items():
            self._handles.append(module.weight.register_hook(self._adder(self._raw, name)))
            if isinstance(module, WeightStandardized) and module.formula is not None:
                self._handles.append(module.register_standardized_hook(self._watcher(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    @staticmethod
    def _adder(store: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            gradient = gradient.detach()
            gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
            store[name] = store[name] + gradient if name in store else gradient.clone()

        return add

    def _watcher(self, name: str) -> Callable[[Tensor], None]:
        def watch(result: Tensor) -> None:
            if result.requires_grad:
                result.register_hook(self._adder(self._standardized, name))

        return watch

    def layers(self) -> dict[str, WeightGradient]:
        """The gradients of every convolution that got one."""
        result = {}
        for name, module in self._convs.items():
            if name not in self._raw:
                continue
            bound = None
            if name in self._standardized:
                assert isinstance(module, WeightStandardized)
                filters = module.filters(self._standardized[name])
                bound = (filters.norm(dim=1) / module.denominators()).norm().item()
            result[name] = WeightGradient(self._raw[name].norm().item(), bound)
        return result


@dataclass
class Smoothness:
    """How loss and gradient change along one step (Santurkar et al., arXiv 1805.11604).

    Attributes:
        loss: At the point itself.
        gradient_norm: Likewise, ``|g|`` over all parameters.
        step_sizes: How far it was gone: parameters minus ``step_size`` times g.
        losses: The loss there.
        gradient_distances: ``|g(there) - g|``: gradient predictiveness, small is predictable.
        betas: ``|g(there) - g| / |there - here|``.
    """

    loss: float
    gradient_norm: float
    step_sizes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradient_distances: list[float] = field(default_factory=list)
    betas: list[float] = field(default_factory=list)

    @property
    def loss_range(self) -> float:
        """Highest minus lowest loss along the step."""
        return max(self.losses) - min(self.losses)

    @property
    def beta(self) -> float:
        """Effective beta-smoothness: the largest of ``betas``."""
        return max(self.betas)


def smoothness(
    model: nn.Module,
    loss: Callable[[], Tensor],
    step_size: float,
    factors: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
) -> Smoothness:
    """Measures loss and gradient along the step that gradient descent would take now.

    Parameters, buffers (running estimates) and random numbers are afterwards what they were, and
    every evaluation starts from the same: dropout and estimates do not differ between points.

    Betas are per unit of raw weight. WS makes the loss independent of the scale of a filter, so
    they compare networks whose weights have about the same norm.

    Args:
        model: The model, in the mode in which it is trained.
        loss: Computes the loss of a fixed batch with the model; called ``1 + len(factors)`` times.
        step_size: The learning rate; > 0.
        factors: Step sizes in multiples of it (Santurkar et al. take 0.5 to 4); each > 0.

    Returns:
        The measures.

    Raises:
        ValueError: no factor, one that is not positive, or no parameter that requires a gradient.
    """
    if step_size <= 0 or not factors or min(factors) <= 0:
        raise ValueError(
            'step_size and every one of at least one factor must be positive\n'
            f'  got step_size {step_size}, factors {list(factors)}'
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError('model must have parameters that require a gradient\n  got none')
    start = [p.detach().clone() for p in parameters]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    norms = [module for module in model.modules() if isinstance(module, BatchChannelNorm)]
    layers = [(norm, norm.remembered()) for norm in norms]

    def put_back(values: Iterable[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for target, value in values:
                target.copy_(value)

    def put_back_buffers() -> None:
        put_back(buffers)
        for layer, remembered in layers:
            layer.remember(remembered)

    def gradient() -> tuple[float, list[Tensor]]:
        # The same random numbers for every point, and none used up.
        with torch.random.fork_rng(), torch.enable_grad():
            value = loss()
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        put_back_buffers()
        return value.item(), [
            torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found)
        ]

    try:
        value, here = gradient()
        size = _norm(here)
        result = Smoothness(value, size)
        for factor in factors:
            put_back((p, s - step_size * factor * g) for p, s, g in zip(parameters, start, here))
            value, there = gradient()
            distance = _norm([a - b for a, b in zip(there, here)])
            result.step_sizes.append(step_size * factor)
            result.losses.append(value)
            result.gradient_distances.append(distance)
            result.betas.append(distance / (step_size * factor * size) if size > 0 else 0.0)
    finally:
        put_back(zip(parameters, start))
        put_back_buffers()
    return result


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))
