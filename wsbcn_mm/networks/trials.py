"""Running a model on an example: which of its layers run, and what they get."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def modes_kept(*modules: nn.Module) -> Iterator[None]:
    """Afterwards each part trains or evaluates as before.

    Not by ``train()``, which has side effects in some hosts.
    """
    modes = {part: part.training for module in modules for part in module.modules()}
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def run_on(model: nn.Module, example_input: object, also: Iterable[nn.Module] = ()) -> object:
    """Calls a model in evaluation mode without gradients; a tuple holds several arguments.

    ``also``: modules beside it that it may run, in evaluation mode as well.
    """
    modules = (model, *also)
    with modes_kept(*modules), torch.no_grad():
        model.eval()
        for part in (part for module in modules for part in module.modules()):
            part.training = False
        arguments = example_input if isinstance(example_input, tuple) else (example_input,)
        return model(*arguments)


@contextmanager
def input_axes(norms: Iterable[nn.Module]) -> Iterator[dict[int, set[int]]]:
    """How many axes the inputs of each norm have while this lasts, by the norm's id."""
    axes: dict[int, set[int]] = {}

    def look(norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
        if x is not None:
            axes.setdefault(id(norm), set()).add(x.dim())

    hooks = [m.register_forward_pre_hook(look, with_kwargs=True) for m in norms]
    try:
        yield axes
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def called(layers: Collection[nn.Module]) -> Iterator[set[int]]:
    """The ids of those layers that are called while this lasts."""
    ran: set[int] = set()
    ids = {id(layer) for layer in layers}

    def note(layer: nn.Module, *_: object) -> None:
        ran.add(id(layer))  # a layer that took over the hooks of another comes by, too

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()
        ran &= ids
