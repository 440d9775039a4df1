"""What other libraries fold by themselves ends in one sentence that points to `wsbcn_mm.fold`.

``model.fuse()`` of ultralytics, ``reparameterize_model`` of timm (which calls ``fuse``,
``reparameterize`` or ``switch_to_deploy`` of blocks), torch's ``fuse_modules``: all multiply the
raw weight of a convolution by the scale of a BatchNorm. Standardized weights have no use for that,
and BCN is no BatchNorm.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from wsbcn_mm.layers.conv import WeightStandardized
from wsbcn_mm.layers.norm import BatchChannelNorm

BEGINNINGS = ('fuse', 'reparam', 'switch_to_deploy')
OURS = (WeightStandardized, BatchChannelNorm)


def turn_off_shortcuts(model: nn.Module) -> list[nn.Module]:
    """Switches off mmcv's way to fold in every evaluation, an option of its ConvModule.

    Returns:
        The modules that hold our layers and had it on.
    """
    had = []
    for module in model.modules():
        shortcut = getattr(module, 'turn_on_efficient_conv_bn_eval', None)
        if shortcut is not None and any(isinstance(child, OURS) for child in module.children()):
            if getattr(module, 'efficient_conv_bn_eval_forward', None) is not None:
                had.append(module)
            shortcut(False)
    return had


def refuse_to_fuse(model: nn.Module) -> None:
    """Lets the methods by which modules fold themselves raise while they hold our layers.

    Where they hold none any more (the model was folded) there is nothing left to do: they return
    the module as it is.

    Args:
        model: Its modules get an attribute in place of such a method. Methods that need arguments,
            that ``forward`` calls, or that run while a module is called, are something else: a step
            of the forward pass.
    """
    for module in model.modules():
        for name in _folding_methods(type(module)):  # type: ignore[arg-type]
            if any(isinstance(child, OURS) for child in module.modules()):
                setattr(module, name, functools.partial(_instead, module, name))


@functools.cache
def _folding_methods(kind: type[nn.Module]) -> tuple[str, ...]:
    steps = _steps_of_forward(kind)
    return tuple(
        name
        for name in dir(kind)
        if name.startswith(BEGINNINGS)
        and name not in steps
        and inspect.isfunction(method := getattr(kind, name))
        and not any(_required(method))
    )


def _steps_of_forward(kind: type[nn.Module]) -> set[str]:
    """Names that ``forward`` uses, and the methods of the class that it calls."""
    names: set[str] = set()
    new = {'forward'}
    while new:
        code = getattr(getattr(kind, new.pop(), None), '__code__', None)
        of_method = set() if code is None else set(code.co_names) - names
        names |= of_method
        new |= of_method
    return names


def _required(method: Callable[..., object]) -> Iterator[bool]:
    """Whether each argument after ``self`` must be given."""
    for argument in list(inspect.signature(method).parameters.values())[1:]:
        several = argument.kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD)
        yield argument.default is argument.empty and not several


def _instead(module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling() or _in_forward_pass():
        return getattr(type(module), name)(module, *args, **kwargs)
    if any(isinstance(child, OURS) for child in module.modules()):
        raise RuntimeError(_sentence(f'{type(module).__name__}.{name}()'))
    return module


def _in_forward_pass() -> bool:
    """Whether a module is being called: what runs then is a step of its, whatever its name."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None


def _sentence(who: str) -> str:
    return (
        f'{who} folds BatchNorms into raw weights, and these layers have standardized weights and '
        'BCN\n  use wsbcn_mm.fold(model, images): a copy for inference, which needs no more folding'
    )


def guard_fuse_modules() -> None:
    """Lets torch.ao.quantization.fuse_modules, which knows none of our classes, say what to use."""
    module: Any = sys.modules.get('torch.ao.quantization.fuse_modules')
    original = getattr(module, 'get_fuser_method', None)
    if original is None or hasattr(original, 'knows_wsbcn'):
        return

    @functools.wraps(original)
    def get_fuser_method(kinds: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(kind, type) and issubclass(kind, OURS) for kind in kinds):
            raise RuntimeError(_sentence('fuse_modules'))
        return original(kinds, *args, **kwargs)

    get_fuser_method.knows_wsbcn = True  # type: ignore[attr-defined]
    module.get_fuser_method = get_fuser_method
