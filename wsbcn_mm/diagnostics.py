"""Why a network trains well or badly, as plain numbers: singularities, estimates, smoothness.

Three observers attach to a model, watch the forward and backward passes that run anyway, and change
nothing::

    with ActivationObserver(model) as activations, EstimateObserver(model) as estimates:
        for batch in data:
            model(batch)
    print(singularities(activations), estimate_gaps(estimates))

`smoothness` asks for the loss at other points, and puts everything back.

- **Elimination singularities** (arXiv 1911.09738): a channel that its ReLU switches off for every
  input is out of the network for good. BatchNorm keeps channels away from that by construction;
  GroupNorm does not; WS and BCN should. `ActivationObserver` watches the input of every ReLU.
- **Gap of the estimates**: running statistics stand for those of the data when the model is used.
  `EstimateObserver` compares the two, layer by layer.
- **Smoothness** (Santurkar et al., arXiv 1805.11604): how the loss and its gradient change along
  the step that is taken. `WeightGradientObserver` holds the gradient of each raw weight against the
  bound that WS gives.

The papers give no formula for the distance to singularities; ours are `stat_spread` and
`singularity_distance` of `ActivationStatistics`, named and defined there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wsbcn_mm import recomputation
from wsbcn_mm.layers import BatchChannelNorm, WeightStandardized

RELUS = {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_}


class _Moments:
    """Mean and variance per channel of all values shown, in float64, without cancellation."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, x: Tensor) -> None:
        """Shows x (N, C, L)."""
        count = x.size(0) * x.size(2)
        mean = x.mean((0, 2), dtype=torch.float64)
        squares = (x.double() - mean.view(-1, 1)).square().sum((0, 2))
        if self.count == 0:
            self.count, self.mean, self.squares = count, mean, squares
            return
        # Chan, Golub, LeVeque: two sets of values become one.
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def std(self) -> Tensor:
        return (self.squares / self.count).sqrt()


def _as_rows(x: Tensor) -> Tensor:
    """(N, C, *) as (N, C, L) in float32 or float64, without gradient."""
    x = x.detach()
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)


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
        self._moments: dict[str, _Moments] = {}
        self._calls: Counter[str] = Counter()
        self._stack: list[str] = []

    def __enter__(self) -> ActivationObserver:
        self._handles = []
        for name, module in self._model.named_modules():
            self._handles += [
                module.register_forward_pre_hook(lambda *_, name=name: self._enter_module(name)),
                module.register_forward_hook(
                    lambda *_: self._leave_module(), always_call=True
                ),
            ]  # fmt: skip
        self._mode = _ReluMode(self._see)
        self._mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._mode.__exit__(*error)
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
        x = _as_rows(input)
        dead, active = (x <= 0).all(2).sum(0), (x > 0).sum((0, 2))
        if name not in self._moments:
            self._moments[name] = _Moments()
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

    def __torch_function__(self, func, types, args=(), kwargs=None):
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
        name: sum(getattr(layer, name) for layer in layers.values()) / len(layers)
        for name in names
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------
# Running estimates against the data

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
        self._layers: dict[str, tuple[nn.Module, nn.Module]] = {}
        inner: set[nn.Module] = set()
        for name, module in model.named_modules():
            if isinstance(module, BatchChannelNorm):
                self._layers[name] = module, module.bn
                inner.add(module.bn)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module not in inner:
                if module.running_mean is not None:
                    self._layers[name] = module, module
        self._moments: dict[str, _Moments] = {}

    def __enter__(self) -> EstimateObserver:
        self._handles = [
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: self._see(name, inputs[0])
            )
            for name, (module, _) in self._layers.items()
        ]
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, input: Tensor) -> None:
        if input.numel() > 0 and not recomputation.is_repeated():
            with torch.no_grad():
                self._moments.setdefault(name, _Moments()).add(_as_rows(input))

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


# ----------------------------------------------------------------------------------------------
# Gradients and smoothness


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
    bound meaningless. Comparators of `wsbcn_mm.comparators` count as convolutions without WS.

    Args:
        model: The model; forward and backward passes under ``with`` are those that count.
    """

    def __init__(self, model: nn.Module) -> None:
        self._convs = {
            name: module for name, module in model.named_modules()
            if isinstance(module, nn.modules.conv._ConvNd) and module.weight.requires_grad
        }  # fmt: skip
        self._raw: dict[str, Tensor] = {}
        self._standardized: dict[str, Tensor] = {}

    def __enter__(self) -> WeightGradientObserver:
        self._handles = []
        for name, module in self._convs.items():
            self._handles.append(module.weight.register_hook(self._adder(self._raw, name)))
            if _is_standardized(module):
                module._standardize = self._watched(module._standardize, name)
                module._cache.clear()
        return self

    def __exit__(self, *error) -> None:
        for handle in self._handles:
            handle.remove()
        for module in self._convs.values():
            if _is_standardized(module):
                del module._standardize  # the class's own again
                module._cache.clear()

    @staticmethod
    def _adder(store: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            gradient = gradient.detach()
            gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
            store[name] = store[name] + gradient if name in store else gradient.clone()

        return add

    def _watched(self, standardize: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        def watched(*args) -> Tensor:
            value = standardize(*args)
            if value.requires_grad:
                value.register_hook(self._adder(self._standardized, name))
            return value

        return watched

    def layers(self) -> dict[str, WeightGradient]:
        """The gradients of every convolution that got one."""
        result = {}
        for name, module in self._convs.items():
            if name not in self._raw:
                continue
            bound = None
            if name in self._standardized:
                g = _filters(module, self._standardized[name]).norm(dim=1)
                bound = (g / _denominator(module)).norm().item()
            result[name] = WeightGradient(self._raw[name].norm().item(), bound)
        return result


def _is_standardized(module: nn.Module) -> bool:
    return isinstance(module, WeightStandardized) and module.formula is not None


def _filters(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as (output channels, fan-in)."""
    if module.transposed:
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _denominator(module: WeightStandardized) -> Tensor:
    """What WS divides each filter by, (O,)."""
    rows = _filters(module, module.weight.detach())
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if module.formula == 'std_eps':
        return rows.std(1) + module.eps
    return (rows.var(1, unbiased=module.formula == 'var_eps') + module.eps).sqrt()


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

    def put_back(values: Iterable[tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            for target, value in values:
                target.copy_(value)

    def gradient() -> tuple[float, list[Tensor]]:
        # The same random numbers for every point, and none used up.
        with torch.random.fork_rng(), torch.enable_grad():
            value = loss()
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        put_back(buffers)
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
        put_back(buffers)
    return result


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))
