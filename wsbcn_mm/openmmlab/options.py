"""``--cfg-options``: settings of a config from the command line, and what is wrong with them."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import FlexibleRunner, Runner

from wsbcn_mm.openmmlab.places import value_at

# What the hosts and these tools read beside the arguments of a runner. Everything else on the top
# level of a config is a variable of the file, which has done its work when the file was read.
READ_BESIDES = (
    'runner_type',
    'find_unused_parameters',
    'sync_bn',
    'model_wrapper_cfg',
    'compile',
    'custom_imports',
    'tta_model',
    'tta_pipeline',
)


DICT = re.compile(r'\{\s*[\'"]\w|\bdict\(')  # a template such as epoch_{}.pth is none


class OptionsAction(DictAction):
    """mmengine's action, which says in one sentence what it does not understand."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Reads ``key=value`` pairs."""
        for text in values:
            key, separator, value = text.partition('=')
            if not separator:
                raise argparse.ArgumentError(self, f'key=value is expected\n  got {text}')
            if '[' in key:
                plain = key.replace('[', '.').replace(']', '')
                message = f'an entry of a list is named by its number: {plain}\n  got {key}'
                raise argparse.ArgumentError(self, message)
            if DICT.search(value):
                message = f'no dict can be given: set what is in it, {key}.name=value\n  got {text}'
                raise argparse.ArgumentError(self, message)
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, RecursionError, ValueError) as error:  # brackets, commas
            message = (
                'takes KEY=VALUE with numbers, texts and lists of them as values: a.b.c=1, '
                f'"a.b=[1,2]"\n  got {" ".join(values)}'
            )
            raise argparse.ArgumentError(self, message) from error


def merge(cfg: Config, options: dict[str, Any]) -> None:
    """Sets what the command line says.

    Args:
        cfg: Changed in place.
        options: ``{'a.b.c': value}``.

    Raises:
        ValueError: a place that the config does not have.
    """
    for key, value in options.items():
        try:
            cfg.merge_from_dict({key: value})
        except (KeyError, TypeError) as error:
            raise ValueError(f'--cfg-options {key}: {_why_no_place(cfg, key)}') from error


def _why_no_place(cfg: Config, key: str) -> str:
    at: Any = cfg._cfg_dict
    done: list[str] = []
    for part in key.split('.'):
        where = '.'.join(done)
        if isinstance(at, (list, tuple)):
            if not (part.isdigit() and int(part) < len(at)):
                return (
                    f'{where} is a list of {len(at)}, whose entries are named by numbers from 0\n'
                    f'  got {part}'
                )
            at = at[int(part)]
        elif isinstance(at, dict):
            at = at.get(part)
        else:
            return f'{where} is {at!r}, which has nothing inside\n  got {part}'
        done.append(part)
    return f'it is {at!r}, which cannot be replaced by this'


def names_read() -> set[str]:
    """What the top level of a config may hold so that mmengine or these tools read it."""
    read = {*READ_BESIDES}
    for runner in (Runner, FlexibleRunner):
        read |= {*inspect.signature(runner).parameters}
    return read


def without_effect(cfg: Config, base: Config, text: str) -> list[str]:
    """A line for each variable of a base that a file sets anew, and nothing comes of it.

    A child's ``train_pipeline = [...]`` does not change the loader that the base has made with its
    own one.

    Args:
        cfg: The config.
        base: What it inherits.
        text: The file.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a template of mmengine
        return []
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    assigned = [s.targets for s in tree.body if isinstance(s, ast.Assign)]
    own = [t.id for targets in assigned for t in targets if isinstance(t, ast.Name)]
    read, lines = names_read(), []
    for name in dict.fromkeys(own):
        if name in read or name in used or name not in base or base[name] == cfg.get(name):
            continue
        places = [p for p in _made_of(base, name, read) if _at(cfg, p) == _at(base, p)]
        if places and not any(True for _ in _made_of(cfg, name, read)):
            lines.append(
                f'{name} is set, a variable of the base, and nothing uses it here: what the base '
                f'made of its own stays{_set_instead(places)}'
            )
    return lines


def _at(cfg: Config, key: str) -> Any:
    return value_at(cfg, tuple(int(k) if k.isdigit() else k for k in key.split('.')), None)


def _set_instead(places: list[str]) -> str:
    more = f' and {len(places) - 4} more' if len(places) > 4 else ''
    return f'\n  set {", ".join(places[:4])}{more}' if places else ''


def unread(cfg: Config, options: dict[str, Any]) -> list[str]:
    """A line for each option that most likely changes nothing: its name is read by nobody known.

    Most often a variable of the config file (``data_root``, ``num_classes``): what the file has
    made of it stays as it is.

    Args:
        cfg: The config before the options.
        options: ``{'a.b.c': value}``.
    """
    read, lines = names_read(), []
    for key in options:
        name = key.partition('.')[0]
        if name in read:
            continue
        if name in cfg:
            where = _set_instead(list(_made_of(cfg, name, read)))
            lines.append(
                f'--cfg-options {key}: {name} is a variable of the config file, which neither '
                f'mmengine nor these tools read; what the file made of it stays{where}'
            )
        else:
            near = difflib.get_close_matches(name, sorted(read | {*cfg}), n=1, cutoff=0.6)
            mean = f'\n  did you mean {near[0]}?' if near else ''
            lines.append(f'--cfg-options {key}: neither mmengine nor these tools read {name}{mean}')
    return lines


def _made_of(cfg: Config, name: str, read: set[str]) -> Iterator[str]:
    """The keys that hold the value of a variable: as it is, or as the beginning of a path."""
    value = cfg[name]
    for key, found in _values(cfg._cfg_dict):
        first, _, rest = key.partition('.')
        if first not in read:
            continue
        same = type(found) is type(value) and found == value
        if value is None or isinstance(value, (int, float)):  # others are the same by chance
            same = same and rest.rpartition('.')[2] == name
        path = isinstance(value, str) and '/' in value and isinstance(found, str)
        if same or (path and found.startswith(value)):
            yield key


def _values(value: Any, key: str = '') -> Iterator[tuple[str, Any]]:
    """All that a config holds, by the key of an option."""
    if key:
        yield key, value
    if isinstance(value, (dict, list, tuple)):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from _values(part, f'{key}.{name}' if key else str(name))
