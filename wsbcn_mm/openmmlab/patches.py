"""Functions of the hosts that are called by way of one of ours."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

originals: dict[str, Any] = {}
"""All that this package changes in the hosts: what stood there before, by its full name."""


def surround(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Puts one of our functions around one of a host; where it is already, nothing changes.

    ``setattr(owner, name, originals[...])`` takes it away again.

    Args:
        owner: The class or module that has it.
        name: Of the function, or of the method of any kind.
        ours: Is called in its place, with the original in front of the arguments.
    """
    there = inspect.getattr_static(owner, name)
    kind = type(there) if isinstance(there, (classmethod, staticmethod)) else None
    original = there if kind is None else there.__func__
    by = f'{ours.__module__}.{ours.__qualname__}'
    if getattr(original, 'surrounded_by', None) == by:
        return

    @functools.wraps(original)
    def surrounded(*args: Any, **kwargs: Any) -> Any:
        return ours(original, *args, **kwargs)

    surrounded.surrounded_by = by  # type: ignore[attr-defined]
    setattr(owner, name, surrounded if kind is None else kind(surrounded))
    holder = owner.__name__ if inspect.ismodule(owner) else f'{owner.__module__}.{owner.__name__}'
    originals[f'{holder}.{name}'] = there
