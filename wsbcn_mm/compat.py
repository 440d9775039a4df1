"""Where the promised releases of torch differ, and what torch has no public name for.

Nothing else in the package asks which torch is installed. OpenMMLab's gaps are closed in
`wsbcn_mm.openmmlab.compat`.

Importing this file checks the installed torch: one that is too old is an error, one that is newer
than those tested a warning.
"""

import re
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor

P = ParamSpec('P')
R = TypeVar('R')

OLDEST = (2, 6)
"""Older ones are refused; setup.py says the same."""

NEWEST = (2, 14)
"""The newest of tools/dev/stacks.txt; newer ones get one line."""


def check_torch() -> None:
    """Compares the installed torch with the releases that this package was tested with.

    Raises:
        ImportError: it is too old.

    Warns:
        UserWarning: it is newer than all of them.
    """
    installed = tuple(int(part) for part in re.findall(r'\d+', torch.__version__)[:2])
    oldest, newest = ('.'.join(map(str, release)) for release in (OLDEST, NEWEST))
    if installed < OLDEST:
        raise ImportError(
            f'wsbcn_mm needs torch >= {oldest}\n  got {torch.__version__}\n'
            f"  pip install 'torch>={oldest}'"
        )
    if installed > NEWEST:
        warnings.warn(
            f'wsbcn_mm was tested with torch {oldest} to {newest}, not yet with '
            f'{torch.__version__}',
            stacklevel=3,
        )


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


def saved_tensors_may_be_hooked() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are active in this thread.

    Before torch 2.8 it cannot be asked: True.
    """
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    return top is None or top(True) is not None  # True: also while tracing


CheckpointFrame = torch.utils.checkpoint._CheckpointFrame
"""What torch makes for one run of a part that is checkpointed without reentrance."""

CHECKPOINT_FILE = torch.utils.checkpoint.__file__
"""Where frames of torch's checkpointing on the interpreter's stack come from."""


def recording_checkpoint() -> object | None:
    """The innermost checkpointed part that records this thread's forward pass; None if none does.

    Before torch 2.8 it cannot be asked: None.
    """
    top = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)
    hooks = None if top is None else top(True)
    for cell in () if hooks is None else getattr(hooks[0], '__closure__', None) or ():
        if isinstance(cell.cell_contents, CheckpointFrame):
            return cell.cell_contents
    return None


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for one without having values: of exporting, of compiling."""
    return isinstance(tensor, FakeTensor)


def keep_address(*tensors: torch.Tensor) -> None:
    """Says that tensors stay where they are, so that CUDA graphs of compiled code may change them.

    Parameters and buffers of modules are taken for such without asking.
    """
    for tensor in tensors:
        if tensor.is_cuda:
            torch._dynamo.mark_static_address(tensor)


def not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """A function that torch.compile runs as it is, between two graphs.

    `torch.compiler.disable` does the same and imports the compiler at once.
    """
    kept: Callable[P, R] = torch._disable_dynamo(function)  # type: ignore[attr-defined]
    return kept


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """What autocast computes in on this type of device; None where it is off or not to be had."""
    # Before torch 2.12 the tracer stops at the first question. What is compiled runs on a device
    # that has autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    if not available or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


check_torch()
