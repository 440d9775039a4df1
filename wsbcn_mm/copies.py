"""Copies of modules, of what `copy.deepcopy` refuses or takes along too much."""

import copy
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

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
        for value in tree_leaves(dict(vars(part))):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for name, value in vars(part).items():
            if not hooks and 'hook' in name and isinstance(value, dict):
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)
