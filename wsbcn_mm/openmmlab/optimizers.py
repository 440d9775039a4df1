"""What the optimizer does with which parameters, said in a few lines.

mmengine logs every setting of every parameter where the config has ``paramwise_cfg``, and a line
for every frozen one: hundreds of lines at each start.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

from mmengine.logging import MMLogger
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn

SHOWN = ('lr', 'weight_decay')


def log_in_short(runner: Runner) -> None:
    """Lets a runner log a summary where it builds its optimizer.

    With ``log_level='DEBUG'`` mmengine's own lines are logged as well.

    Args:
        runner: Changed: its ``build_optim_wrapper``, where it has one.
    """
    build: Callable[..., Any] | None = getattr(runner, 'build_optim_wrapper', None)
    if build is None:
        return

    def build_and_summarise(*args: Any, **kwargs: Any) -> Any:
        logger = MMLogger.get_current_instance()
        # An MMLogger has the level in its handlers.
        levels = {handler: handler.level for handler in logger.handlers}
        for handler, level in levels.items():
            if level > logging.DEBUG:
                handler.setLevel(max(level, logging.ERROR))
        try:
            built = build(*args, **kwargs)
        finally:
            for handler, level in levels.items():
                handler.setLevel(level)
        lines = [*summary(built, runner.model), *unmatched(args[0] if args else None, runner.model)]
        logger.info('\n  '.join(lines))
        return built

    runner.build_optim_wrapper = build_and_summarise


def unmatched(cfg: object, model: nn.Module) -> list[str]:
    """A line for what ``custom_keys`` names and no parameter of the model is called.

    Args:
        cfg: That of the optimizer; what was built already, or is none, has no such keys.
        model: With the parameters.
    """
    settings = (cfg.get('paramwise_cfg') or {}) if isinstance(cfg, dict) else {}
    names = [name for name, _ in model.named_parameters()]
    keys = [k for k in settings.get('custom_keys') or () if not any(k in name for name in names)]
    return [f'custom_keys: no parameter has {", ".join(keys)} in its name'] if keys else []


def summary(built: OptimWrapper | OptimWrapperDict, model: nn.Module) -> list[str]:
    """A line for each learning rate and weight decay, with the number of parameters that have it.

    Args:
        built: With its optimizer.
        model: For the parameters that no optimizer has.
    """
    wrappers = dict(built.items()) if isinstance(built, OptimWrapperDict) else {'': built}
    counts: Counter[tuple[str, tuple[tuple[str, Any], ...]]] = Counter()
    seen = set()
    for name, wrapper in wrappers.items():
        for group in wrapper.optimizer.param_groups:
            settings = tuple((key, group[key]) for key in SHOWN if key in group)
            counts[name, settings] += len(group['params'])
            seen |= {id(parameter) for parameter in group['params']}
    lines = [f'optimizer: {sum(counts.values())} parameters']
    for (name, settings), count in counts.most_common():
        whose = f'{name}: ' if name else ''
        lines.append(f'{whose}{count} with ' + ', '.join(f'{k}={v:g}' for k, v in settings))
    without = sum(id(parameter) not in seen for parameter in model.parameters())
    if without:
        lines.append(f'{without} are not trained')
    return lines
