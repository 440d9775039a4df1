"""Convolutions whose weights are standardized: parameters and state dict are torch's.

They derive **directly** from torch's own class (a mixin supplies the rest), because OpenMMLab's
initialisation and weight-decay rules look at direct base classes. A WS convolution offers no way to
run with a foreign weight: shortcuts that fold a BatchNorm into the raw weight would be silently
wrong. (Each point is a test in tests/openmmlab.)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsbcn_mm import functional
from wsbcn_mm.backends import autograd
from wsbcn_mm.checks import FORMULAS, check_choice, check_eps, check_fan_in
from wsbcn_mm.layers.weight_cache import StandardizedWeightCache


class WeightStandardized:
    """What the WS convolutions share; a mixin in front of a torch convolution.

    The layer's parameters and state dict are those of torch's convolution: the optimizer updates
    the raw ``weight``; what convolves is `standardized_weight`.
    """

    def __init__(self, *args, eps: float = 1e-5, formula: str = 'paper', **kwargs) -> None:
        check_eps(eps)
        check_choice(formula, FORMULAS, 'formula')
        super().__init__(*args, **kwargs)
        check_fan_in(self.in_channels // self.groups * math.prod(self.kernel_size))
        self.eps = eps
        self.formula = formula
        self._cache = StandardizedWeightCache()

    def standardized_weight(self) -> Tensor:
        """The weight that convolves, in the shape of ``weight``; differentiable.

        Computed once until the weight changes, see `layers.weight_cache`: do not edit it. In the
        dtype of ``weight``; under autocast, in the one in which the convolution runs.
        """
        weight, dtype = self.weight, self.weight.dtype
        device = weight.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        if autocast and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        return self._cache.get(weight, self.eps, self.formula, dtype, self._standardize)

    def _standardize(self, weight: Tensor, eps: float, formula: str, dtype: torch.dtype) -> Tensor:
        # Not through `functional`: its checks were made when the layer was.
        return autograd.weight_standardize(weight, eps, formula, dtype)

    def train(self, mode: bool = True) -> nn.Module:
        """Sets the mode, as in torch; forgets the standardized weight."""
        self._cache.clear()
        return super().train(mode)

    def forward(self, input: Tensor) -> Tensor:
        """Convolves with the standardized weight; shapes as in torch's convolution."""
        return super()._conv_forward(input, self.standardized_weight(), self.bias)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Hosts call this to convolve with a weight of their own making.
        if weight is self.weight and bias is self.bias:
            return self.forward(input)
        raise RuntimeError(
            f'{type(self).__name__} was asked to convolve with a weight that is not its own\n'
            "  shortcuts that fold a BatchNorm into the raw weight of a convolution (OpenMMLab's "
            'efficient_conv_bn_eval) are wrong for standardized weights\n'
            '  switch the shortcut off, or turn the layer into a plain convolution with .to_plain()'
        )

    def to_plain(self) -> nn.Module:
        """A torch convolution of the same kind whose weight is this layer's standardized weight.

        Same results in evaluation; training it no longer standardizes. Copies, shares nothing.
        """
        # 'modules': the class of a parametrized layer lives in torch.nn.utils.
        kind = next(c for c in type(self).__mro__ if c.__module__.startswith('torch.nn.modules.'))
        arguments = dict(
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        if self.transposed:
            arguments['output_padding'] = self.output_padding
        plain = kind(self.in_channels, self.out_channels, self.kernel_size, **arguments)
        with torch.no_grad():
            weight = self._standardize(self.weight, self.eps, self.formula, self.weight.dtype)
            plain.weight.copy_(weight)
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain.train(self.training)

    def extra_repr(self) -> str:
        """Torch's line, followed by eps and formula."""
        return f'{super().extra_repr()}, eps={self.eps}, formula={self.formula!r}'


_CONV_DOC = """{name} with Weight Standardization (arXiv 1903.10520, equations 5-7).

    ``y = conv(x, (w - mean) / sqrt(var + eps)) + bias``, mean and biased variance of w per output
    channel over its fan-in; the same in training and in evaluation. Outputs are about sqrt(fan-in)
    times larger than those of a freshly initialised plain convolution: use it only where a
    normalisation follows.

    Args:
        *args, **kwargs: Exactly those of `torch.nn.{name}`, bias, groups, dilation, padding_mode,
            device and dtype included.
        eps: Added in the denominator, >= 0.
        formula: ``'paper'``, ``'std_eps'`` (mmcv ConvWS, GN+WS checkpoints) or ``'var_eps'`` (the
            authors' BCN checkpoints); see `wsbcn_mm.functional.weight_standardize`.

    Shapes, dtypes and the state dict are those of `torch.nn.{name}`.

    Raises:
        ValueError: a fan-in of 1 (depthwise 1x1), a negative eps, an unknown formula.
    """


class WSConv1d(WeightStandardized, nn.Conv1d):
    __doc__ = _CONV_DOC.format(name='Conv1d')


class WSConv2d(WeightStandardized, nn.Conv2d):
    __doc__ = _CONV_DOC.format(name='Conv2d')


class WSConv3d(WeightStandardized, nn.Conv3d):
    __doc__ = _CONV_DOC.format(name='Conv3d')


class WSConvTranspose2d(WeightStandardized, nn.ConvTranspose2d):
    __doc__ = _CONV_DOC.format(name='ConvTranspose2d')

    def _standardize(self, weight: Tensor, eps: float, formula: str, dtype: torch.dtype) -> Tensor:
        # A transposed weight is (C_in, C_out / groups, *k): an output channel's fan-in are the
        # input channels of its group.
        by_group = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
        rows = functional.weight_standardize(by_group.flatten(0, 1), eps, formula, dtype)
        return rows.view_as(by_group).transpose(1, 2).flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution with the standardized weight; shapes as in torch's."""
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            input,
            self.standardized_weight(),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
