"""What a layer hands over to the one that takes its place, and when it cannot."""

import weakref

from torch import nn

from wsbcn_mm.networks.own_classes import ACTIVATION

_NORMS = nn.BatchNorm2d(1), nn.SyncBatchNorm(1), nn.GroupNorm(1, 1)
_OF_NORMS = {name for norm in _NORMS for name in (*vars(norm), *norm._buffers)}


def why_not(layer: nn.Module) -> str | None:
    """Why no other layer can do what this one does, whatever its class; None: one can."""
    for name in ('weight', 'bias'):
        computed = vars(layer).get(name) is not None  # pruned, weight norm: no parameter
        if computed or name in getattr(layer, 'parametrizations', ()):
            return f'its {name} is computed by another parametrization, or pruned'
    methods = sorted(n for n in vars(layer) if callable(getattr(type(layer), n, None)))
    return f'its {methods[0]} was set on it, and is no method of its class' if methods else None


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Mode, hooks, and what others keep on the old layer: hooks and code of theirs read it.

    The very dictionaries that hold the hooks: a handle that somebody keeps still removes its own.
    """
    new.train(old.training)
    for name, value in vars(old).items():
        if name not in _OF_NORMS and not hasattr(new, name):
            vars(new)[name] = value  # as it was kept, be it a module or a parameter
    for name, value in old._buffers.items():
        if name not in _OF_NORMS and not hasattr(new, name):
            new.register_buffer(name, value, name not in old._non_persistent_buffers_set)
    for kept in ('_parameters', '_modules'):
        for name, value in getattr(old, kept).items():
            if name not in ACTIVATION and not hasattr(new, name):
                getattr(new, kept)[name] = value
    for name in vars(nn.Module()):
        if 'hook' in name:
            vars(new)[name] = vars(old)[name]
    belong_to(new)


def pass_on_calls(inner: nn.Module, outer: nn.Module) -> None:
    """Gives the hooks of forward and backward passes to the module that now does what they saw."""
    for name, empty in vars(nn.Module()).items():
        if 'hook' in name and 'state_dict' not in name:
            vars(outer)[name], vars(inner)[name] = vars(inner)[name], empty


def belong_to(layer: nn.Module) -> None:
    """Hooks that want the module that they are called for get this one."""
    for name, hooks in vars(layer).items():
        if 'hook' in name and isinstance(hooks, dict):
            for hook in hooks.values():
                if getattr(hook, 'with_module', False):
                    hook.module = weakref.ref(layer)
