"""Parameter schedulers at another rate, or over another number of iterations.

Which of their settings are rates and which are counts is not listed here: it is found out from the
class, so that a scheduler which nobody has thought of is right, too.

- Counts: mmengine's schedulers know how to become ones by iteration (``build_iter_from_epoch``),
  and multiply their own counts with the length of an epoch.
- Rates: a schedule is proportional to its rates. The scheduler runs at a rate, and at twice that
  rate: the settings which must be doubled, too, so that every value doubles, are rates.
"""

from __future__ import annotations

import importlib
import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config
from mmengine.optim.scheduler.momentum_scheduler import MomentumSchedulerMixin
from mmengine.registry import PARAM_SCHEDULERS

from wsbcn_mm.openmmlab.config import HOSTS
from wsbcn_mm.openmmlab.places import Place

STEPS = 64  # of a trial run
LONGEST_WARM_UP = 0.5  # of a training
HALF_DONE = 0.5  # of a schedule
SHORTEST = 2  # iterations of a scheduler: one that ends after the first leaves the rate there
SHAPE_TOLERANCE = 0.05  # of the range: most schedulers reach their end one step before it


class UnknownScheduler(ValueError):
    """It cannot be told what the settings of a scheduler are."""


def scheduler_class(cfg: Config, scheduler: Mapping[str, Any]) -> type:
    """The class of a scheduler's config.

    Raises:
        UnknownScheduler: the registry has none of this name.
    """
    kind = scheduler['type']
    if isinstance(kind, str):
        scope = cfg.get('default_scope')
        if scope in HOSTS:
            importlib.import_module(f'{scope}.engine')
        with PARAM_SCHEDULERS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)  # the host's own need no scope in their name
    if not isinstance(kind, type):
        raise UnknownScheduler(f'no scheduler of the name {scheduler["type"]!r} is known')
    return kind


def over_other_iterations(
    cfg: Config, scheduler: Mapping[str, Any], factor: float
) -> dict[str, Any]:
    """A scheduler that counts iterations, with every count times ``factor``; others unchanged.

    Raises:
        UnknownScheduler: its counts are not all that says how fast it goes (ExponentialLR has a
            factor per iteration), or its class does not know them.
    """
    if scheduler.get('by_epoch', True):
        return dict(scheduler)
    kind = scheduler_class(cfg, scheduler)
    short = _in_short(kind, scheduler, STEPS // 2)
    slow = _values(kind, _counts_times(kind, short, 2), 1.0)
    apart = [abs(a - b) for a, b in zip(_values(kind, short, 1.0), slow[::2])]
    if sum(apart) / len(apart) > SHAPE_TOLERANCE * (max(slow) - min(slow)):
        raise UnknownScheduler(f'{kind.__name__} does not go by its counts alone')
    new = _counts_times(kind, scheduler, factor)
    begin, end = scheduler.get('begin', 0), scheduler.get('end')
    if isinstance(end, int) and end - begin >= SHORTEST:
        new['end'] = max(new['end'], new.get('begin', 0) + SHORTEST)
    return new


@dataclass(frozen=True)
class WarmUp:
    """A rate that rises, counted in iterations.

    Attributes:
        place: Of its end in the config.
        first: Share of the rate that it begins with.
        end: Iteration from which on the whole rate holds.
        count: Iterations of the training.
        better: Where it should end.
    """

    place: Place
    first: float
    end: int
    count: int

    @property
    def better(self) -> int:
        return max(SHORTEST, self.count // 10)


def long_warm_up(cfg: Config, count: int | None) -> WarmUp | None:
    """What is still rising when half of a training of ``count`` iterations is over, if anything."""
    found: Any = cfg.get('param_scheduler') or []
    listed = isinstance(found, (list, tuple))
    for i, scheduler in enumerate(found if listed else [found]):
        if count is None or not isinstance(scheduler, dict):
            continue  # unknown; a dict of several optimizers has no such keys
        first: Any = scheduler.get('start_factor', scheduler.get('factor', 1))  # of ConstantLR
        end = scheduler.get('end')
        rises = first < scheduler.get('end_factor', 1) and scheduler.get('begin', 0) == 0
        if rises and end and not scheduler.get('by_epoch', True) and end > LONGEST_WARM_UP * count:
            place = ('param_scheduler', *((i,) if listed else ()), 'end')
            return WarmUp(place, first, end, count)
    return None


@dataclass(frozen=True)
class CutOff:
    """A scheduler whose work the end of the training cuts off.

    Attributes:
        place: Of the scheduler in the config.
        count: When it does its work.
        total: When the training ends.
        unit: What both count.
    """

    place: str
    count: int
    total: int
    unit: str


def cut_off(cfg: Config, iterations: int | None) -> CutOff | None:
    """The first scheduler that has not begun, or is not half done, when the training ends.

    Args:
        cfg: The config.
        iterations: Of the whole training; None: unknown.
    """
    for place, scheduler in _places('param_scheduler', cfg.get('param_scheduler') or []):
        epochs = scheduler.get('by_epoch', True)
        total = (cfg.get('train_cfg') or {}).get('max_epochs') if epochs else iterations
        if not total:
            continue
        unit = 'epoch' if epochs else 'iteration'
        first = min(scheduler.get('milestones') or [scheduler.get('begin', 0)])
        if first >= total:
            return CutOff(place, first, total, unit)
        steady = {'milestones', 'factor', 'start_factor'} & {*scheduler}  # also a warm-up
        end = scheduler.get('end')
        if isinstance(end, int) and end > total / HALF_DONE and not steady:
            return CutOff(place, end, total, unit)
    return None


def _counts_times(kind: type, scheduler: Mapping[str, Any], factor: float) -> dict[str, Any]:
    build = getattr(kind, 'build_iter_from_epoch', None)
    if build is None:
        raise UnknownScheduler(f'{kind.__name__} has no build_iter_from_epoch to tell its counts')
    settings = {key: value for key, value in scheduler.items() if key != 'by_epoch'}
    # The method would build `cls(**settings)`: with dict as the class, it returns the settings.
    stretched = build.__func__(dict, **settings, by_epoch=True, epoch_length=factor)
    new = dict(scheduler)
    for key in new.keys() & stretched.keys() - {'by_epoch', 'type'}:
        if stretched[key] != new[key]:
            new[key] = _whole(stretched[key])
    return new


def _whole(value: Any) -> Any:
    """Counts are whole numbers, at least 1 (0 stays)."""
    if isinstance(value, (list, tuple)):
        return type(value)(_whole(item) for item in value)
    return max(1, round(value)) if value else value


def rates_of(cfg: Config, scheduler: Mapping[str, Any], lr: float) -> tuple[str, ...]:
    """Names of the settings of a scheduler that are rates, such as ``'eta_min'``.

    Args:
        cfg: The config, for its scope.
        scheduler: The scheduler's config.
        lr: The rate that it begins with.

    Raises:
        UnknownScheduler: it does not run, or is not proportional to any of its settings.
    """
    kind = scheduler_class(cfg, scheduler)
    if issubclass(kind, MomentumSchedulerMixin) or scheduler.get('param_name', 'lr') != 'lr':
        return ()
    short = _in_short(kind, scheduler, STEPS)
    candidates = [key for key, value in short.items() if _is_rate_like(value)]
    candidates = [key for key in candidates if short[key] == scheduler[key]]  # no count
    once = _values(kind, short, lr)
    for number in range(len(candidates) + 1):
        for names in itertools.combinations(candidates, number):
            doubled = short | {name: _times(short[name], 2) for name in names}
            try:
                twice = _values(kind, doubled, 2 * lr)
            except UnknownScheduler:  # a factor beyond its range: it is not a rate
                continue
            if all(abs(b - 2 * a) <= 1e-9 * lr for a, b in zip(once, twice, strict=True)):
                return names
    raise UnknownScheduler(f'{kind.__name__} is not proportional to its rates')


def at_other_rate(
    scheduler: Mapping[str, Any], names: Iterable[str], factor: float
) -> dict[str, Any]:
    """A scheduler with the settings of these names times ``factor``."""
    return dict(scheduler) | {name: _times(scheduler[name], factor) for name in names}


def _is_rate_like(value: Any) -> bool:
    """A number other than 0, or a list of them."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_is_rate_like(item) for item in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_times(item, factor) for item in value)
    return float(f'{value * factor:.6g}') if value else value


def _in_short(kind: type, scheduler: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The same with no count above so many steps, so that a few show everything."""
    if not hasattr(kind, 'build_iter_from_epoch'):
        return dict(scheduler)
    doubled = _counts_times(kind, scheduler, 2)
    counts = [scheduler[key] for key in scheduler if doubled[key] != scheduler[key]]
    flat = [n for count in counts for n in (count if isinstance(count, (list, tuple)) else [count])]
    longest = max(flat, default=0)
    return _counts_times(kind, scheduler, steps / longest) if longest > steps else dict(scheduler)


def _values(kind: type, scheduler: Mapping[str, Any], lr: float) -> list[float]:
    """The rates of a run of the scheduler, until it ends."""
    settings = {key: value for key, value in scheduler.items() if key not in _BUILDERS_OWN}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it steps before the optimizer does
        try:
            built = kind(optimizer, **settings)
        except Exception as error:  # its own checks, whatever they raise
            raise UnknownScheduler(f'{kind.__name__} cannot be built: {error}') from error
        metrics = [{built.monitor: 1.0}] if getattr(built, 'need_val_args', False) else []
        values = [optimizer.param_groups[0]['lr']]
        for _ in range(STEPS):
            try:
                built.step(*metrics)
            except ValueError:  # beyond the steps that it was made for (OneCycleLR)
                break
            values.append(optimizer.param_groups[0]['lr'])
    return values


# What mmengine's builder takes out of a scheduler's config.
_BUILDERS_OWN = ('type', 'convert_to_iter_based', '_scope_')


def rate_options(cfg: Config, rate: float) -> str:
    """What is put behind ``--cfg-options`` for a rate: with it the schedulers' own rates.

    Args:
        cfg: The config, with the rate that it has now.
        rate: The new one.
    """
    old = cfg.optim_wrapper.optimizer.lr
    found: dict[str, Any] = {'optim_wrapper.optimizer.lr': rate}
    for place, scheduler in _places('param_scheduler', cfg.get('param_scheduler') or []):
        for name in rates_of(cfg, scheduler, old):
            found[f'{place}.{name}'] = at_other_rate(scheduler, [name], rate / old)[name]
    return ' '.join(
        f'{key}={value}' if isinstance(value, float) else f'{key}="{value}"'
        for key, value in found.items()
    )


def _places(place: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    if isinstance(value, (list, tuple)):
        return [found for i, part in enumerate(value) for found in _places(f'{place}.{i}', part)]
    return [(place, value)] if 'type' in value else []
