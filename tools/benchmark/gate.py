"""The check before any timing: our layers against `wsbcn_mm.reference` in float64.

What we return in half precision may err twice as much as plain torch in that dtype, or one
rounding of the largest value. What we return in float32, also for half precision inputs
(gradients of float32 parameters, buffers), is held to 1e-5 of the largest value, twice that for
gradients of parameters: sums over all positions, in which most cancels.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmark.peers import NUM_GROUPS, autocast, by_reference
from wsbcn_mm import BatchChannelNorm2d, WSConv2d, backends, functional, reference

TOLERANCE = 1e-5
MODES = ('estimate', 'batch', 'eval')
SHAPES = ((1, 64, 5, 6), (2, 256, 25, 38), (64, 64, 7, 7), (1, 64, 100, 152), (2, 2048, 5, 7))
WEIGHTS = ((64, 3, 7, 7), (256, 64, 1, 1), (128, 128, 3, 3), (64, 2048, 1, 1))
QUICK = 1  # of the shapes and weights in a quick run

LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}
Results = dict[str, Tensor]


class Gate:
    """Collects comparisons.

    Attributes:
        count: How many results were compared.
        failures: One line per result that is wrong.
        worst: The largest error, as a share of what is allowed.
    """

    def __init__(self) -> None:
        self.count, self.worst = 0, 0.0
        self.failures: list[str] = []

    def compare(self, what: str, ours: Results, truth: Results, plain: Results) -> None:
        """Judges every result of ``truth`` by name; ``plain`` may lack some."""
        for name, expected in truth.items():
            scale = expected.abs().max().item()
            error = _error(ours[name], expected)
            dtype = ours[name].dtype
            if dtype in (torch.float32, torch.float64):
                allowed = TOLERANCE * scale * (2 if name.startswith('gradient of p') else 1)
            else:
                theirs = _error(plain[name], expected)
                floor = torch.finfo(dtype).eps * scale
                allowed = max(floor, 2 * theirs if math.isfinite(theirs) else 0.0)
            self.count += 1
            self.worst = max(self.worst, error / allowed if math.isfinite(error) else math.inf)
            if not error <= allowed:  # also where the error is not a number
                self.failures.append(
                    f'{what}: {name}: largest error {error:.3g}, allowed {allowed:.3g}'
                )


def _error(found: Tensor, expected: Tensor) -> float:
    return (found.double() - expected).abs().max().item()


def run(
    device: torch.device, dtypes: list[torch.dtype], layouts: list[str], quick: bool = False
) -> Gate:
    """Compares everything that will be timed, and the eager backend, which is a peer."""
    gate = Gate()
    names = dict.fromkeys((backends.select(torch.empty(1, device=device)), 'eager'))
    for name in names:
        with backends.use_backend(name):
            for dtype in dtypes:
                kind = f'backend {name}, {str(dtype).removeprefix("torch.")}'
                # A GPU's kernels are compiled one by one, which takes most of the time there.
                few = device.type == 'cuda' and dtype != torch.float32
                for layout in layouts:
                    for shape in SHAPES[:QUICK] if quick else SHAPES[: 3 if few else None]:
                        for mode in MODES:
                            what = f'BCN {mode}, {shape}, {layout}, {kind}'
                            _check_norm(gate, what, shape, mode, device, dtype, layout)
                    for shape in WEIGHTS[:QUICK] if quick else WEIGHTS:
                        for formula in functional.FORMULAS:
                            what = f'WS {formula}, {shape}, {layout}, {kind}'
                            _check_weight(gate, what, shape, formula, device, dtype, layout)
    return gate


def _check_norm(gate, what, shape, mode, device, dtype, layout) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    channels = shape[1]
    norm = BatchChannelNorm2d(channels, NUM_GROUPS, mode='batch' if mode == 'batch' else 'estimate')
    with torch.no_grad():
        for parameter in norm.parameters():
            # Exact in the dtype, so that plain torch's rounding of parameters is not its error.
            parameter.copy_((random(*parameter.shape) * 0.3 + 1).to(dtype))
        norm.bn.running_mean.copy_((random(channels) + 2).to(dtype))
        norm.bn.running_var.copy_((random(channels).abs() + 0.5).to(dtype))
    # Off centre, and different in every channel.
    x = random(*shape) * (random(channels).abs() + 0.5).view(-1, 1, 1) + 2
    norm = norm.to(device).train(mode != 'eval')
    x, cotangent = (
        t.to(device, dtype, memory_format=LAYOUTS[layout]) for t in (x, random(*shape) + 0.2)
    )
    double = copy.deepcopy(norm).double()
    plain = copy.deepcopy(norm).to(dtype)
    gate.compare(
        what,
        _norm_results(norm, norm, x, cotangent),
        _norm_results(double, partial(by_reference, double), x.double(), cotangent.double()),
        _norm_results(plain, partial(_by_torch, plain), x, cotangent),
    )


def _norm_results(norm: nn.Module, forward: Callable, x: Tensor, cotangent: Tensor) -> Results:
    x = x.detach().clone().requires_grad_()  # clone keeps the layout
    y = forward(x)
    y.backward(cotangent)
    more = {}
    if not norm.training:  # another way through the backend: nothing is kept for a gradient
        with torch.no_grad():
            more['y without gradient'] = forward(x)
    gradients = {f'gradient of parameter {name}': p.grad for name, p in norm.named_parameters()}
    buffers = {name: getattr(norm.bn, name) for name in ('running_mean', 'running_var')}
    return {'y': y.detach(), **more, 'gradient of x': x.grad, **gradients, **buffers}


def _by_torch(norm: BatchChannelNorm2d, x: Tensor) -> Tensor:
    """F.batch_norm, then F.group_norm, with the statistics that the mode asks for."""
    mean, var = norm.bn.running_mean, norm.bn.running_var
    rate: Any = norm.momentum
    use_batch = norm.training and norm.mode == 'batch'
    if norm.training and not use_batch:
        updated = reference.update_estimates(x.double(), mean.double(), var.double(), rate)
        mean, var = (t.to(x.dtype) for t in updated)
    x1 = F.batch_norm(x, mean.clone(), var.clone(), norm.batch_weight, norm.batch_bias, use_batch)
    weight, bias = (reference.expand_groups(p, x.size(1)) for p in (norm.weight, norm.bias))
    return F.group_norm(x1, norm.num_groups, weight, bias)


def _check_weight(gate, what, shape, formula, device, dtype, layout) -> None:
    generator = torch.Generator().manual_seed(0)
    conv = WSConv2d(shape[1], shape[0], shape[2:], formula=formula)
    with torch.no_grad():
        conv.weight.copy_((torch.randn(shape, generator=generator) * 0.05 + 0.02).to(dtype))
    conv = conv.to(device).to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    cotangent = torch.randn(shape, generator=generator)
    cotangent = cotangent.to(device, dtype, memory_format=LAYOUTS[layout])
    plain = partial(reference.weight_standardize, formula=formula)

    def results(standardize: Callable, precision: torch.dtype) -> Results:
        weight = conv.weight.detach().to(precision).requires_grad_()
        w_hat = standardize(weight)
        w_hat.backward(cotangent.to(w_hat.dtype))
        return {'weight': w_hat.detach(), 'gradient of parameter weight': weight.grad}

    with autocast(device, dtype):
        ours = conv.standardized_weight()
    ours.backward(cotangent)
    gate.compare(
        what,
        {'weight': ours.detach(), 'gradient of parameter weight': conv.weight.grad},
        results(plain, torch.float64),
        results(plain, dtype),
    )
