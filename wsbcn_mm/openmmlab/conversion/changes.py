"""What a conversion does to a config: values that are set, each with its reason."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

from mmengine.config import Config, ConfigDict

from wsbcn_mm.openmmlab.places import Place, dotted, value_at

DEFAULT = '(default)'


@dataclass(frozen=True)
class Setting:
    """A value to be set: where, what, and why."""

    place: Place
    value: Any
    why: str = ''


@dataclass(frozen=True)
class Change:
    """One value that was set: where, what it was, what it is, and why."""

    where: str
    before: object
    after: object
    why: str = ''

    def __str__(self) -> str:
        why = f'  # {self.why}' if self.why else ''
        return f'{self.where}: {_one_line(self.before)} -> {_one_line(self.after)}{why}'


@dataclass
class Conversion:
    """What `convert_config` returns.

    Attributes:
        cfg: The converted config, complete.
        source: The file that was read; None when a Config was given that has none.
        base: How a child names it, such as ``'mmdet::...'``; None when it cannot be named.
        original: The config as it was.
        changes: Every value that was set.
        left: Parts that stay as they are, with the reason.
        warnings: What the user should know before training.
    """

    cfg: Config
    source: str | None
    base: str | None
    original: Config
    changes: list[Change] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [str(change) for change in self.changes]
        lines += [f'left as it is: {text}' for text in self.left]
        return '\n'.join([*lines, *(f'warning: {text}' for text in self.warnings)])

    def set(self, place: Place, value: Any, why: str = '') -> None:
        """Sets a value of the converted config and notes the change; equal values are none."""
        parent, key = value_at(self.cfg, place[:-1]), place[-1]
        missing = isinstance(parent, dict) and key not in parent
        before = DEFAULT if missing else parent[key]
        if not missing and before == value:
            return
        if isinstance(value, dict):
            value = ConfigDict(value)
        parent[key] = value
        # A place that is set twice is one change, and so is one inside of another that was set.
        if outer := self._changed_around(place):
            self._note_anew(outer, why)
            return
        for change in [change for change in self.changes if change.where == dotted(place)]:
            before, why = change.before, why or change.why
            self.changes.remove(change)
        self.changes.append(Change(dotted(place), before, value, why))

    def _changed_around(self, place: Place) -> Place | None:
        """The outermost place around this one that was set."""
        around = [place[:length] for length in range(1, len(place))]
        where = [change.where for change in self.changes]
        return next((outer for outer in around if dotted(outer) in where), None)

    def _note_anew(self, place: Place, why: str = '') -> None:
        """Has a change show what stands at its place now."""
        after = copy.deepcopy(value_at(self.cfg, place))
        for i, change in enumerate(self.changes):
            if change.where == dotted(place):
                reasons = dict.fromkeys(filter(None, (change.why, why)))
                self.changes[i] = replace(change, after=after, why=', '.join(reasons))

    def build_from_kind(self, place: Place, builder: str, why: str) -> None:
        """Has a part built by one of our builders, which gets its type as ``kind``.

        Args:
            place: Of the part.
            builder: ``'Kept'`` or ``'Converted'``.
            why: The reason.
        """
        kind = str(value_at(self.cfg, place)['type'])
        # MMAction2 calls a backbone of MMPretrain in another way, and knows it by this.
        scope = 'mmpretrain.' if kind.startswith('mmpretrain.') else ''
        self.set((*place, 'type'), f'{scope}{builder}', why)
        self.set((*place, 'kind'), kind)

    def restore(self, place: Place) -> None:
        """Puts back what the original has at a place, and forgets that it was changed."""
        parent, key = value_at(self.cfg, place[:-1]), place[-1]
        original = value_at(self.original, place[:-1])
        self.changes = [change for change in self.changes if change.where != dotted(place)]
        if key in original:
            parent[key] = copy.deepcopy(original[key])
        else:
            del parent[key]
        if outer := self._changed_around(place):
            self._note_anew(outer)


def _one_line(value: object) -> str:
    if isinstance(value, dict):
        items = ', '.join(f'{k}={_one_line(v)}' for k, v in value.items() if k != '_scope_')
        return f'dict({items})'
    if isinstance(value, (list, tuple)):
        return '[' + ', '.join(_one_line(item) for item in value) + ']'
    return DEFAULT if value == DEFAULT else repr(value)
