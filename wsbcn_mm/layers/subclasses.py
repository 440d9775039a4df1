"""Weight Standardization for convolutions that have a class of their own.

Libraries derive from torch's convolutions to pad in another way or to take other arguments (timm's
``Conv2dSame``, torchvision's ``Conv3DSimple``), or write one of their own (deformable convolutions
of mmcv and torchvision). As long as such a class computes with its own ``weight``, its WS form is
the same ``forward`` with the standardized weight in that place. Names in the state dict, the
parameter and everything else that the layer holds stay.
"""

import copy
import functools
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from wsbcn_mm import compat
from wsbcn_mm.checks import FORMULAS, check_choice, check_eps, check_fan_in
from wsbcn_mm.layers.conv import WeightStandardized
from wsbcn_mm.networks.copies import copied


class StandardizedSubclass(WeightStandardized):
    """The WS form of a convolution class, ``plain_class``; see `standardized_class`."""

    plain_class: ClassVar[type[_ConvNd]]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``plain_class`` computes, with the standardized weight."""
        given = (*args, *kwargs.values())
        if any(compat.is_traced_by_fx(value) for value in given):
            return self.as_leaf(*args, **kwargs)
        view = self._with(self._weight_for(*given), self._computed())
        attributes, parameters = dict(view.__dict__), dict(view._parameters)
        try:
            return self.plain_class.forward(view, *args, **kwargs)
        finally:  # what it keeps on itself, it keeps
            _change(self._parameters, parameters, view._parameters)
            _change(self.__dict__, attributes, view.__dict__)

    def _with(self, weight: Tensor, computed: dict[str, Tensor]) -> _ConvNd:
        """This layer as one of ``plain_class`` with another weight; shares all the rest."""
        view = object.__new__(self.plain_class)
        parameters = {**self._parameters, **computed, 'weight': weight}
        view.__dict__.update(self.__dict__, _parameters=parameters)
        # Of a pruned or sharded layer, or a replica: an attribute, which would be found first.
        view.__dict__.pop('weight', None)
        return view

    def _computed(self) -> dict[str, Tensor]:
        """Other parameters than the weight that are parametrized."""
        names = self._modules.get('parametrizations')
        others = (name for name in getattr(names, '_modules', ()) if name != 'weight')
        return {name: getattr(self, name) for name in others}

    def to_plain(self) -> _ConvNd:
        """See `WeightStandardized.to_plain`: one of ``plain_class``, without hooks."""
        self._check_forward()
        weight = self._weight_in_evaluation().detach()
        computed = {name: value.detach() for name, value in self._computed().items()}
        plain = copied(self._with(weight, computed), hooks=False)
        plain._modules.pop('parametrizations', None)
        for name in ('eps', 'formula', 'standardized_hooks'):
            del plain.__dict__[name]
        for name, value in {**computed, 'weight': weight}.items():
            plain._parameters[name] = nn.Parameter(value.clone())
        plain.weight.requires_grad_(self.weight.requires_grad)
        return plain

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made when it is asked for: a pickle names the one that it is made of.
        return _blank, (self.plain_class,), self.__dict__


def _change(own: dict[str, Any], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Does to a dictionary what happened to another one."""
    for name in before.keys() | after.keys():
        if name not in after:
            own.pop(name, None)
        elif name not in before or before[name] is not after[name]:
            own[name] = after[name]


@functools.cache
def standardized_class(plain_class: type[_ConvNd]) -> type[StandardizedSubclass]:
    """The WS form of a convolution class.

    Args:
        plain_class: A convolution class whose ``forward`` computes with ``self.weight``: a subclass
            of torch's, a transposed one of torch, or one that holds what torch's do.

    Returns:
        A subclass of `WeightStandardized` and of ``plain_class``; layers of it are made by
        `standardized_copy`. ``forward`` standardizes: other methods of ``plain_class``, called from
        elsewhere, see the weight as it is.
    """
    name = f'WS{plain_class.__name__}'
    members = dict(
        plain_class=plain_class,
        __doc__=f'`{plain_class.__name__}` with Weight Standardization.',
        __module__=__name__,
    )
    return type(name, (StandardizedSubclass, plain_class), members)


def standardized_copy(
    conv: _ConvNd, formula: str = 'paper', eps: float = 1e-5
) -> StandardizedSubclass:
    """A convolution as its WS form; the parameters, hooks and all that it holds are shared.

    Args:
        conv: A layer of any convolution class; stays as it is.
        formula: As in `WSConv2d`.
        eps: As in `WSConv2d`.

    Raises:
        ValueError: a fan-in of 1, a negative eps, an unknown formula.
    """
    check_eps(eps)
    check_choice(formula, FORMULAS, 'formula')
    new = _blank(type(conv))
    new.__dict__.update(conv.__dict__)
    for name in ('_parameters', '_buffers', '_modules'):
        new.__dict__[name] = copy.copy(conv.__dict__[name])
    new.eps, new.formula, new.standardized_hooks = eps, formula, {}
    check_fan_in(new.filters(new.weight).shape[1])
    return new


def _blank(plain_class: type[_ConvNd]) -> StandardizedSubclass:
    """A layer that holds nothing yet."""
    return object.__new__(standardized_class(plain_class))  # type: ignore[arg-type]
