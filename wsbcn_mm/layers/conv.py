"""Convolutions whose weights are standardized: parameters and state dict are torch's.

They derive **directly** from torch's own class (a mixin supplies the rest), because OpenMMLab's
initialisation and weight-decay rules look at direct base classes. A WS convolution offers no way to
run with a foreign weight: shortcuts that fold a BatchNorm into the raw weight would be silently
wrong. (Each point is a test in tests/openmmlab.)
"""

import functools
import inspect
import math
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wsbcn_mm import compat
from wsbcn_mm.backends import autograd, states
from wsbcn_mm.checks import FORMULAS, check_choice, check_eps, check_fan_in, check_floating
from wsbcn_mm.layers import standardization
from wsbcn_mm.networks.own_classes import has_own_forward, is_transposed

# What the mixin stands in front of, for the type checker.
if TYPE_CHECKING:
    _Base = nn.modules.conv._ConvNd
else:
    _Base = object


# What is checked whenever it is set.
_SETTINGS: dict[str, Callable[[Any], None]] = {
    'eps': check_eps,
    'formula': functools.partial(check_choice, choices=FORMULAS, name='formula'),
}


class WeightStandardized(_Base):
    """What the WS convolutions share; a mixin in front of a torch convolution.

    The layer's parameters and state dict are those of torch's convolution: the optimizer updates
    the raw ``weight``; what convolves is `standardized_weight`.
    """

    def __init__(
        self, *args: Any, eps: float = 1e-5, formula: str = 'paper', **kwargs: Any
    ) -> None:
        check_eps(eps)
        check_choice(formula, FORMULAS, 'formula')
        super().__init__(*args, **kwargs)
        check_floating(self.weight, 'weight')
        check_fan_in(self.in_channels // self.groups * math.prod(self.kernel_size))
        self.eps = eps
        self.formula = formula
        self.standardized_hooks: dict[int, Callable[[Tensor], None]] = OrderedDict()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls._conv_forward is not WeightStandardized._conv_forward:
            raise _not_asked(cls)

    def standardized_weight(self) -> Tensor:
        """The weight that convolves, in the shape of ``weight``; differentiable.

        Within a scope of `wsbcn_mm.layers.standardization` computed once: do not edit it. In the
        dtype of ``weight``; under autocast, in the one in which the convolution runs.
        """
        weight = self.weight  # once: a parametrized one is computed when it is read
        if not isinstance(weight, Tensor) and compat.is_traced_by_fx(weight):
            w_hat: Tensor = compat.call_in_graph(weight.tracer, self, 'standardized_weight')
            return w_hat
        # An exported program may run without autocast, and notes none: with it, torch casts then.
        dtype = weight.dtype if compat.is_exporting() else states.result_dtype(weight)
        return standardization.standardized(self, weight, dtype)

    def standardize(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Computes what a weight of this layer becomes; always anew.

        Args:
            weight: In the shape of ``self.weight``.
            dtype: Of the result.
        """
        # Not through `functional`: its checks were made when the layer was.
        if not is_transposed(self):
            return autograd.weight_standardize(weight, self.eps, self.formula, dtype)
        by_group = self._by_group(weight)
        rows = autograd.weight_standardize(by_group.flatten(0, 1), self.eps, self.formula, dtype)
        return rows.view_as(by_group).transpose(1, 2).flatten(0, 1)

    def standardizes_rows(self) -> bool:
        """Whether `standardize` is WS of the rows ``weight.flatten(1)``: then of many at once."""
        by_class = type(self).standardize is WeightStandardized.standardize
        return by_class and 'standardize' not in self.__dict__ and not is_transposed(self)

    def register_standardized_hook(self, hook: Callable[[Tensor], None]) -> RemovableHandle:
        """Calls ``hook(w_hat)`` with every standardized weight, once where uses share it.

        Not under torch.compile.
        """
        handle = RemovableHandle(self.standardized_hooks)
        self.standardized_hooks[handle.id] = hook
        return handle

    def filters(self, weight: Tensor) -> Tensor:
        """A weight, or its gradient, by filter.

        Args:
            weight: In the shape of ``self.weight``.

        Returns:
            (out_channels, fan-in): each row is what one output channel is computed with.
        """
        return (self._by_group(weight).flatten(0, 1) if is_transposed(self) else weight).flatten(1)

    def _by_group(self, weight: Tensor) -> Tensor:
        """A transposed weight, (C_in, C_out / G, *k), as (G, C_out / G, C_in / G, *k).

        The fan-in of an output channel are the input channels of its group.
        """
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2)

    def denominators(self) -> Tensor:
        """What WS divides each filter by, (out_channels,); without gradient.

        float32, or float64 where the weight is.
        """
        rows = self.filters(self.weight.detach())
        _, sigma = autograd.filter_statistics(rows, self.eps, self.formula)
        return sigma + self.eps if self.formula == 'std_eps' else sigma

    def __setattr__(self, name: str, value: Any) -> None:
        # torch.nn.utils.fuse_conv_bn_eval, which torch's quantization calls too: it would give a
        # copy of this layer the raw weight times the scale of a BatchNorm.
        if name == 'weight' and compat.is_of(sys._getframe(1), 'torch.nn.utils.fusion'):
            raise RuntimeError(
                f'fuse_conv_bn_eval cannot fold a BatchNorm into a {type(self).__name__}, which '
                'standardizes the result\n  use wsbcn_mm.fold(model), or fold into .to_plain()'
            )
        check = _SETTINGS.get(name)
        if check is not None:
            check(value)
        if name == 'eps':
            value = float(value)
        if name == '_conv_forward':
            raise _not_asked(type(self))
        super().__setattr__(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: bool, **kwargs: bool) -> nn.Module:
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        states.note_change()  # torch writes through .data, and memory is soon used again
        return self

    def _weight_is_usual(self) -> bool:
        """Whether nobody overrides `standardized_weight`, in a class or in this layer."""
        by_class = type(self).standardized_weight is _STANDARDIZED_WEIGHT
        return by_class and 'standardized_weight' not in self.__dict__

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """As in torch; not for to_mkldnn, which has just taken the raw weight."""
        if compat.is_of(sys._getframe(1), 'torch.utils.mkldnn'):
            raise RuntimeError(
                f'to_mkldnn cannot take a {type(self).__name__}: it would convolve with the raw '
                'weight\n  use wsbcn_mm.fold(model) first'
            )
        return super().named_children()

    def forward(self, input: Tensor) -> Tensor:
        """Convolves with the standardized weight; shapes as in torch's convolution."""
        parameters = self._parameters
        # Not there: it is parametrized or pruned, and somebody else's to compute.
        if not torch.compiler.is_compiling() and self._weight_is_usual() and 'bias' in parameters:
            bias = parameters['bias']
            if (bias is None or not bias.is_meta) and isinstance(input, Tensor):
                w_hat = standardization.usual(self)
                if w_hat is not None:
                    return super()._conv_forward(input, w_hat, bias)
        if not isinstance(input, Tensor) and compat.is_traced_by_fx(input):
            return self.as_leaf(input)
        return super()._conv_forward(input, self._weight_for(input), self.bias)

    def _weight_for(self, *inputs: Any) -> Tensor:
        """What convolves with inputs; read once, for a parametrized weight is computed anew."""
        w_hat = self.standardized_weight()
        # A weight on the meta device has no values; torch convolves with whatever is in memory.
        bias = self._parameters.get('bias')  # a deformable convolution may have none at all
        of_bias = bias is not None and bias.is_meta
        real = [x for x in inputs if isinstance(x, Tensor) and not x.is_meta]
        if (w_hat.is_meta or of_bias) and real:
            raise ValueError(
                f'{type(self).__name__}: weight or bias are on the meta device, the input on '
                f'{real[0].device}\n  load the weights (load_state_dict(..., assign=True)) or make '
                'them (to_empty(device=...), then initialise) first'
            )
        return w_hat

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Hosts call this to convolve with a weight of their own making.
        if weight is self.weight and bias is self.bias:
            return self.forward(input)
        raise self._foreign_weight()

    def as_leaf(self, *args: Any, **kwargs: Any) -> Any:
        """The call as `torch.fx.symbolic_trace` notes it: of a layer that it does not look into."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:  # it is refused now, not when the trained model is evaluated
            if compat.is_of(frame, 'mmengine.model.efficient_conv_bn_eval'):
                raise self._foreign_weight()
            frame = frame.f_back
        return compat.call_as_leaf(self, *args, **kwargs)

    def _foreign_weight(self) -> RuntimeError:
        return RuntimeError(
            f'{type(self).__name__} was asked to convolve with a weight that is not its own\n'
            "  shortcuts that fold a BatchNorm into the raw weight of a convolution (OpenMMLab's "
            'efficient_conv_bn_eval) are wrong for standardized weights\n'
            '  switch the shortcut off, or turn the layer into a plain convolution with .to_plain()'
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first."""
        raise RuntimeError(
            f'torch.jit.script cannot take a {type(self).__name__}\n'
            '  use torch.jit.trace or torch.export, or .to_plain()'
        )

    def to_plain(self) -> nn.modules.conv._ConvNd:
        """A torch convolution of the same kind whose weight is this layer's standardized weight.

        Same results in evaluation; training it no longer standardizes. Copies, shares nothing.

        Raises:
            TypeError: a class derived from the layer's, or somebody who set it, gave it another
                ``forward``, which a convolution of torch does not have.
        """
        self._check_forward()
        # 'modules': the class of a parametrized layer lives in torch.nn.utils.
        kind = next(c for c in type(self).__mro__ if c.__module__.startswith('torch.nn.modules.'))
        arguments = dict(
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias is not None,
            padding_mode=self.padding_mode,
            device='meta',  # no random values, which would not be used
            dtype=self.weight.dtype,
        )
        if self.transposed:
            arguments['output_padding'] = self.output_padding
        plain = kind(self.in_channels, self.out_channels, self.kernel_size, **arguments)
        plain.to_empty(device=self.weight.device)
        with torch.no_grad():
            plain.weight.copy_(self._weight_in_evaluation())
            if self.bias is not None:
                plain.bias.copy_(self.bias)
        return plain.train(self.training)

    def _check_forward(self) -> None:
        if has_own_forward(self):
            raise TypeError(
                f'{type(self).__name__}: to_plain() gives a convolution of torch, and this layer '
                'has a forward pass of its own\n  give that to a module around a convolution'
            )

    def _weight_in_evaluation(self) -> Tensor:
        if self._weight_is_usual():
            return self.standardize(self.weight, self.weight.dtype)
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.standardized_weight()

    def extra_repr(self) -> str:
        """Torch's line, followed by eps and formula."""
        torchs = super().extra_repr()  # type: ignore[no-untyped-call]
        return f'{torchs}, eps={self.eps}, formula={self.formula!r}'


_STANDARDIZED_WEIGHT = WeightStandardized.standardized_weight


def _not_asked(kind: type) -> TypeError:
    return TypeError(
        f'{kind.__name__}: the _conv_forward of a WS convolution cannot be overridden, it is not '
        'asked\n  override forward, or standardized_weight'
    )


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


def _signature(kind: type[nn.Module]) -> inspect.Signature:
    """That of a torch convolution with our arguments: torch's skip_init looks for ``device``."""
    signature = inspect.signature(kind)
    own = inspect.signature(WeightStandardized).parameters
    return signature.replace(
        parameters=[*signature.parameters.values(), own['eps'], own['formula']]
    )


class WSConv1d(WeightStandardized, nn.Conv1d):
    __doc__ = _CONV_DOC.format(name='Conv1d')
    __signature__ = _signature(nn.Conv1d)


class WSConv2d(WeightStandardized, nn.Conv2d):
    __doc__ = _CONV_DOC.format(name='Conv2d')
    __signature__ = _signature(nn.Conv2d)


class WSConv3d(WeightStandardized, nn.Conv3d):
    __doc__ = _CONV_DOC.format(name='Conv3d')
    __signature__ = _signature(nn.Conv3d)


class WSConvTranspose2d(WeightStandardized, nn.ConvTranspose2d):
    __doc__ = _CONV_DOC.format(name='ConvTranspose2d')
    __signature__ = _signature(nn.ConvTranspose2d)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Transposed convolution with the standardized weight; shapes as in torch's."""
        if not isinstance(input, Tensor) and compat.is_traced_by_fx(input):
            return self.as_leaf(input, output_size)
        w_hat = self._weight_for(input)
        sizes: list[Any] = [self.stride, self.padding, self.kernel_size, 2, self.dilation]
        output_padding = self._output_padding(input, output_size, *sizes)
        return F.conv_transpose2d(
            input,
            w_hat,
            self.bias,
            self.stride,
            self.padding,  # type: ignore[arg-type]  # never a str: transposed ones have no 'same'
            output_padding,
            self.groups,
            self.dilation,
        )
