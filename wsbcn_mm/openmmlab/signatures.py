"""What classes and functions take."""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


def parameters_of(kind: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """What a class or a function takes by name, what ``**kwargs`` hands to bases included."""
    found: dict[str, inspect.Parameter] = {}
    for function in _constructors(kind) if inspect.isclass(kind) else [kind]:
        parameters = list(inspect.signature(function).parameters.values())
        if inspect.isclass(kind):
            parameters = parameters[1:]  # self
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _constructors(kind: type) -> list[Callable[..., Any]]:
    bases = [base for base in inspect.getmro(kind) if base not in (nn.Module, object)]
    return [vars(base)['__init__'] for base in bases if '__init__' in vars(base)]
