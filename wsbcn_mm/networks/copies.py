"""Copies of modules, of what `copy.deepcopy` refuses or takes along too much."""

import copy
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar('Module', bound=nn.Module)


def copied(module: Module, hooks: bool = True) -> Module:
    """A deep copy that shares no tensor.

    What a pass with gradients left on a module (a pruned weight, a loss that it keeps) is copied
    without its graph.

    Args:
        module: Stays as it is.
        hooks: False: a copy without hooks, nor what they refer to; nobody's hook hears of it.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in _tensors_in(vars(part)):
            if not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for name, value in vars(part).items():
            if not hooks and 'hook' in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Those in a value and in its lists, tuples and dictionaries, which may hold themselves."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            waiting.extend(dict.values(value) if isinstance(value, dict) else value)
