"""A package that uses what the installed version of another no longer has.

Evaluators of data sets call packages that are older than the numpy beside them, and stop after the
first epoch.
"""

from __future__ import annotations

from importlib.metadata import packages_distributions, version
from types import ModuleType

from wsbcn_mm.openmmlab.explain.traces import Frame
from wsbcn_mm.openmmlab.explain.wording import cut


def lacks_name(error: BaseException, frames: list[Frame]) -> str | None:
    """An installed package looked up a name in a module of another one, which has none such.

    Args:
        error: What was raised.
        frames: Where; see `traces.frames_of`.
    """
    if not isinstance(error, AttributeError) or not frames:
        return None
    user, module, name = frames[-1], getattr(error, 'obj', None), getattr(error, 'name', None)
    if user.code.co_name == '__getattr__' and 'self' not in user.names and len(frames) > 1:
        name = user.names.get(user.code.co_varnames[0])  # a module says itself what it has
        owner, user = user.module, frames[-2]
    elif isinstance(module, ModuleType):
        owner = module.__name__
    else:
        return None
    there, asking = _installed(owner), _installed(user.module)
    if there is None or asking is None or there == asking:
        return None
    line = user.statement_text()
    return (
        f'{asking} uses {owner}.{name}, and the installed {there} has none\n'
        f'  at {user.module}' + (f': {cut(line, 120)}' if line else '') + '\n'
        f'  install versions that fit each other; or put {owner}.{name} there, in a module of '
        "your own that is named in the config's custom_imports.imports"
    )


def _installed(module: str) -> str | None:
    """The package of a module and its version; None where it was not installed: a user's own."""
    package = module.partition('.')[0]
    found = packages_distributions().get(package)
    return f'{package} {version(found[0])}' if found else None
