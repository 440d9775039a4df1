"""Whether a checkpoint is one that a training can go on from, and what goes on otherwise than said.

mmengine copies the state of the optimizer and of the schedulers as it finds it: settings of another
optimizer end in an error of torch, and what the config says of the schedule is replaced in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mmengine.runner import Runner

from wsbcn_mm.openmmlab import checkpoints
from wsbcn_mm.openmmlab.signatures import parameters_of

ANEW = '  as the config says: load_from without resume'
SCHEDULED = ('params', 'lr', 'momentum', 'betas')  # moves from step to step
NO_SETTINGS = {'params', 'param_names', 'initial_lr', 'initial_momentum'}  # of a group


def cannot_go_on(runner: Runner, checkpoint: dict[str, Any]) -> str | None:
    """Why the training of a runner cannot go on from a checkpoint; None where it can.

    Args:
        runner: Its optimizer is built.
        checkpoint: What is resumed from.
    """
    if not {'epoch', 'iter'} <= checkpoints.meta_of(checkpoint).keys():
        return 'holds no state of a training: no epoch and iter in its meta'
    if 'message_hub' not in checkpoint:  # which mmengine asks for; publishing leaves it out
        return 'holds no state of a training: no message_hub, as one that was published'
    groups, own = _groups(checkpoint.get('optimizer')), _own_groups(runner)
    if not groups or not own:
        return None
    there, here = set(groups[0]) - NO_SETTINGS, set(own[0]) - NO_SETTINGS
    if there - here and here - there:  # versions of torch add settings, and take none away
        return (
            f'is of another optimizer: it has {_some(there - here)}, and the one of this config '
            f'{_some(here - there)}'
        )
    sizes = [[len(group['params']) for group in found] for found in (groups, own)]
    if sizes[0] != sizes[1]:
        return (
            f'is of another training: its optimizer has {sum(sizes[0])} parameters in '
            f'{len(sizes[0])} groups, and the one of this config {sum(sizes[1])} in '
            f'{len(sizes[1])} (model, frozen parts, paramwise_cfg)'
        )
    return None


def _groups(state: Any) -> list[dict[str, Any]]:
    found = state.get('param_groups') if isinstance(state, dict) else None
    return found if isinstance(found, list) else []


def _own_groups(runner: Runner) -> list[dict[str, Any]]:
    """Of one optimizer; mmengine's wrapper adds one that holds no parameters."""
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    return getattr(optimizer, 'param_groups', [])


def _some(names: set[str]) -> str:
    return ', '.join(sorted(names)[:4])


def goes_on_otherwise(runner: Runner, checkpoint: dict[str, Any]) -> Iterator[str]:
    """What of a training will not go on, or not as its config says."""
    groups = _groups(checkpoint.get('optimizer'))
    if 'optimizer' not in checkpoint:
        yield 'holds no state of the optimizer, which starts anew'
    elif groups and _own_groups(runner):
        changed = _changed(groups[0], _own_groups(runner)[0], SCHEDULED)
        if changed:
            yield f'brings the settings of its optimizer along: {changed}\n{ANEW}'
    saved, own = checkpoint.get('param_schedulers'), runner.param_schedulers
    if not isinstance(saved, list) or not isinstance(own, list):
        return
    if len(saved) != len(own):
        yield f'holds {len(saved)} schedulers, and this config has {len(own)}'
    for number, (state, scheduler) in enumerate(zip(saved, own)):
        names = {*parameters_of(type(scheduler)), 'begin', 'end'}
        here = {k: v for k, v in vars(scheduler).items() if k in names}
        changed = _changed(state, here, ('last_step',))
        if changed:
            yield f'brings its schedule along: param_scheduler[{number}] has {changed}\n{ANEW}'


def _changed(saved: dict[str, Any], own: dict[str, Any], but: tuple[str, ...]) -> str:
    names = [name for name in own if name in saved and name not in but]
    found = [name for name in names if saved[name] != own[name]]
    return ', '.join(f'{name}={saved[name]} (the config: {own[name]})' for name in found)
