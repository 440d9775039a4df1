"""Where the promised releases of torch differ, and what torch has no public name for.

Nothing else in the package asks which torch is installed. OpenMMLab's gaps are closed in
`wsbcn_mm.openmmlab.compat`.

Importing this file checks the installed torch: one that is too old is an error, one that is newer
than those tested a warning.
"""

import contextlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ParamSpec, TypeGuard, TypeVar

import torch
import torch.utils.checkpoint
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy

P = ParamSpec('P')
R = TypeVar('R')

OLDEST = (2, 6)
"""Older ones are refused; setup.py says the same."""

NEWEST = (2, 14)
"""The newest of tools/dev/stacks.txt; newer ones get one line."""


def installed() -> tuple[int, ...]:
    """The release of torch that is installed."""
    return tuple(int(part) for part in re.findall(r'\d+', torch.__version__)[:2])


def check_torch() -> None:
    """Compares the installed torch with the releases that this package was tested with.

    Raises:
        ImportError: it is too old.

    Warns:
        UserWarning: it is newer than all of them.
    """
    oldest, newest = ('.'.join(map(str, release)) for release in (OLDEST, NEWEST))
    if installed() < OLDEST:
        raise ImportError(
            f'wsbcn_mm needs torch >= {oldest}\n  got {torch.__version__}\n'
            f"  pip install 'torch>={oldest}'"
        )
    if installed() > NEWEST:
        warnings.warn(
            f'wsbcn_mm was tested with torch {oldest} to {newest}, not yet with '
            f'{torch.__version__}',
            stacklevel=3,
        )


def backward_pass() -> int:
    """The number of the backward pass that runs in this thread; -1 if none does."""
    return torch._C._current_graph_task_id()


TOP_HOOKS: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, '_top_saved_tensors_default_hooks', None
)
"""Tells which hooks on saved tensors are active; None before torch 2.8."""


def saved_tensors_may_be_hooked() -> bool:
    """Whether `torch.autograd.graph.saved_tensors_hooks` are active in this thread.

    Before torch 2.8 it cannot be asked: True.
    """
    return TOP_HOOKS is None or TOP_HOOKS(True) is not None  # True: also while tracing


CheckpointFrame = torch.utils.checkpoint._CheckpointFrame
"""What torch makes for one run of a part that is checkpointed without reentrance."""

CHECKPOINT_FUNCTIONS = ('checkpoint', '_checkpoint_impl')
"""Which of torch's functions run a part for the first time; the second one since torch 2.14."""

CHECKPOINT_FILE = torch.utils.checkpoint.__file__
"""Where frames of torch's checkpointing on the interpreter's stack come from."""


def recording_checkpoint() -> object | None:
    """The innermost checkpointed part that records this thread's forward pass; None if none does.

    Before torch 2.8 it cannot be asked: None.
    """
    hooks = None if TOP_HOOKS is None else TOP_HOOKS(True)
    for cell in () if hooks is None else getattr(hooks[0], '__closure__', None) or ():
        if isinstance(cell.cell_contents, CheckpointFrame):
            return cell.cell_contents
    return None


def is_transformed() -> bool:
    """Whether this thread runs inside a transform of torch.func, or may go forward with tangents.

    Neither a node of autograd's graph nor a kernel of ours knows of tangents; not even of those
    that come with a gradient, where what goes forward is not in front of the node.
    """
    # Not public names; but asking every tensor costs a tenth of a small map.
    return forward_ad._current_level >= 0 or in_transform()


def is_differentiated() -> bool:
    """Whether what a backward pass computes is differentiated again, by a graph or by tangents."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def in_transform() -> bool:
    """Whether this thread runs inside a transform of torch.func."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def allocates_for_graphs(device: torch.device) -> bool:
    """Whether memory that is asked for now belongs to a CUDA graph, and what is kept of it is lost.

    One is captured, or ``torch.compile(mode='reduce-overhead')`` runs what it is about to capture.
    """
    if device.type != 'cuda':
        return False
    if torch.cuda.is_current_stream_capturing():
        return True
    trees = sys.modules.get('torch._inductor.cudagraph_trees')
    of_thread = 'tree_manager_containers'
    if trees is None or not (hasattr(trees.local, of_thread) or torch._C._is_key_in_tls(of_thread)):
        return False
    manager = trees.get_manager(device.index, create_if_none_exists=False)
    return manager is not None and manager.stream == torch.cuda.current_stream(device)


HAS_IS_EXPORTING = hasattr(torch.compiler, 'is_exporting')


def is_exporting() -> bool:
    """Whether torch.export traces."""
    if HAS_IS_EXPORTING:
        return torch.compiler.is_exporting()
    return torch.compiler._is_compiling_flag  # torch 2.6; not set by torch.compile


def is_exporting_to_onnx() -> bool:
    """Whether torch.onnx.export traces, in either of its ways."""
    # Asked at each use of a layer: only a trace imports something.
    return (torch._C._is_tracing() or is_exporting()) and torch.onnx.is_in_onnx_export()


# torch.compile, which torch.export may trace with, cannot look into it and need not: it calls it.
# As torch.compiler.assume_constant_result says, which imports the whole compiler.
is_exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def compiles_backward_passes() -> bool:
    """Whether compiled autograd is on, which can look into nodes written in Python alone."""
    module = sys.modules.get('torch._dynamo.compiled_autograd')
    return module is not None and bool(getattr(module, 'compiled_autograd_enabled', False))


def belongs_to_transforms(tensor: torch.Tensor) -> bool:
    """Whether all transforms of torch.func that run know a tensor, as one that they were given.

    A function that is transformed may edit such tensors and no others.
    """
    functorch = torch._C._functorch
    levels = set()
    while functorch.is_functorch_wrapped_tensor(tensor):
        levels.add(functorch.maybe_get_level(tensor))
        tensor = functorch.get_unwrapped(tensor)
    return levels >= {transform.level() for transform in functorch.get_interpreter_stack() or ()}


def is_traced_by_fx(value: object) -> TypeGuard[Proxy]:
    """Whether a value stands for one in `torch.fx.symbolic_trace`."""
    return isinstance(value, Proxy)


def call_as_leaf(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of a module that `torch.fx.symbolic_trace` does not look into, as torch's own.

    Of a module with hooks, which are in the graph by now, that of its ``forward`` alone.
    """
    tracer: Any = next(v.tracer for v in (*args, *kwargs.values()) if isinstance(v, Proxy))
    if module._forward_pre_hooks or module._forward_hooks:
        return call_in_graph(tracer, module, 'forward', *args, **kwargs)
    return tracer.create_proxy('call_module', tracer.path_of_module(module), args, kwargs)


def call_in_graph(
    tracer: Any, module: torch.nn.Module, method: str, *args: Any, **kwargs: Any
) -> Any:
    """The call of a method of a module, as a step of the graph that `torch.fx` makes."""
    itself = tracer.create_proxy('get_attr', tracer.path_of_module(module), (), {})
    return tracer.create_proxy('call_method', method, (itself, *args), kwargs)


def is_of(frame: FrameType, module: str) -> bool:
    """Whether a function that is called belongs to a module, by its name."""
    loaded = sys.modules.get(module)
    return loaded is not None and frame.f_code.co_filename == loaded.__file__


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


@contextlib.contextmanager
def not_traced() -> Iterator[None]:
    """A block of which `torch.jit.trace` sees nothing."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


check_torch()
