"""Triton's interpreter without the half of its time that it spends on repeating itself."""

import functools
from typing import Any

from triton.runtime import interpreter


class _Nothing:
    """What there is to restore where nothing was patched."""

    def restore(self) -> None:
        pass


def patch_once_per_launch() -> None:
    """Lets a launch patch `triton.language` once for each module whose functions it calls.

    Every call of a function would go through all members of the language, and find that they are
    patched already. An interpreter that does not know scopes is left as it is.
    """
    scopes = getattr(interpreter, '_LangPatchScope', None)
    if scopes is None or hasattr(interpreter._patch_lang, '__wrapped__'):
        return
    patch = interpreter._patch_lang
    patched: set[str] = set()  # modules, since the launch began

    @functools.wraps(patch)
    def once(function: Any) -> Any:
        if function.__module__ in patched:
            return _Nothing()
        scope = patch(function)
        if not patched:  # the kernel itself: its scope ends with the launch
            restore = scope.restore

            def ended() -> None:
                patched.clear()
                restore()

            scope.restore = ended
        patched.add(function.__module__)
        return scope

    interpreter._patch_lang = once
