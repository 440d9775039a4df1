"""Places in a config: keys and positions in lists, from its root."""

from collections.abc import Iterator
from typing import Any

from mmengine.config import Config

# Such as ('model', 'bbox_head', 0, 'norm_cfg').
Place = tuple[str | int, ...]
LR = 'optim_wrapper.optimizer.lr'


def dotted(place: Place) -> str:
    """A place as one writes it, ``model.bbox_head[0].norm_cfg``."""
    text = ''.join(f'[{key}]' if isinstance(key, int) else f'.{key}' for key in place)
    return text.removeprefix('.')


def value_at(root: Any, place: Place, *default: Any) -> Any:
    """What a config holds at a place.

    Args:
        root: The config, or a part of it.
        place: Keys and positions from there.
        *default: What there is otherwise, at most one.

    Raises:
        KeyError, IndexError, TypeError: there is no such place, and no default.
    """
    if isinstance(root, Config):  # which has no `in`
        root = root._cfg_dict
    for key in place:
        try:
            root = root[key]
        except (KeyError, IndexError, TypeError):
            if default:
                return default[0]
            raise
    return root


def same(one: Any, other: Any) -> bool:
    """Whether values are equal; arrays, which a sample may hold, are no values of a config."""
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):
        return False


def walk(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    """A value that stands at a place, and all that it holds, outer ones first."""
    yield place, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, (*place, key))
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from walk(item, (*place, i))


def place_of(root: dict, part: Any, outer: Place) -> Place | None:
    """Where a part that a host has in hands stands; what is added on the way does not count.

    Below ``outer`` first. What is no dict is looked for there alone, as what it holds itself.
    """
    found: list[tuple[int, Place]] = []
    for base in dict.fromkeys((outer, ())):
        for place, value in walk(value_at(root, base, None), base):
            if not isinstance(part, dict):
                if base and len(place) == len(base) + 1 and value is not None and same(value, part):
                    return place
            elif isinstance(value, dict) and value and _holds(part, value):
                found.append((-len(value), place))
        if found:
            return min(found, key=lambda item: item[0])[1]
    return None


def _holds(part: dict, value: dict) -> bool:
    """Whether a dict is another one to which something was added."""
    if 'type' in part and value.get('type', part['type']) != part['type']:
        return False
    return len(value) <= len(part) and all(k in part and same(part[k], v) for k, v in value.items())
