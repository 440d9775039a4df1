"""The operators in C++ for the CPU: vectorised, multi-threaded, no copies of x.

Compiled by setup.py when the package is installed; `unavailable` says what is wrong where that did
not happen or the result does not fit the installed torch.
"""

import importlib.util
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import cast

from torch import Tensor

from wsbcn_mm.backends import dispatched
from wsbcn_mm.backends.ops import DTYPES, Kernels
from wsbcn_mm.backends.schemas import mark

entries: ModuleType | None = None
"""The compiled module: what layers call directly; see nodes/python.cpp."""


def load() -> str | None:
    """Loads the compiled operators; returns the reason where that is not possible."""
    # Without build isolation, or torch is not there when the package is built.
    how = 'pip install --no-build-isolation . (in the folder of wsbcn_mm) compiles them'
    folder = Path(__file__).parent
    paths = [folder / f'_kernels{suffix}' for suffix in EXTENSION_SUFFIXES]
    compiled = [path for path in paths if path.exists()]
    if not compiled:
        return f'the CPU kernels are not compiled for this Python; {how}'
    if mark() not in compiled[0].read_bytes():
        return f'the CPU kernels were compiled for another version of this package; {how} again'
    global entries
    try:
        # Its operators are registered when it is imported.
        spec = importlib.util.spec_from_file_location(f'{__name__}._kernels', compiled[0])
        assert spec is not None and spec.loader is not None
        entries = importlib.util.module_from_spec(spec)
    except ImportError as error:
        return f'the CPU kernels were compiled for another torch ({error}); {how}'
    return None


_REASON = load()


def unavailable() -> str | None:
    """Why this backend cannot be used here, or None."""
    return _REASON


def supports(x: Tensor) -> str | None:
    """Why this backend cannot take ``x``, or None."""
    if x.device.type != 'cpu':
        return f'the CPU kernels cannot take a tensor on {x.device}'
    if x.dtype not in DTYPES:
        return f'the CPU kernels cannot take {x.dtype}'
    return None


def kernels() -> Kernels:
    """The operators of `wsbcn_mm.backends.ops`."""
    return cast(Kernels, dispatched)
