"""What the launcher in C++ (`host`) asks Python for: a kernel, compiled for arguments like these.

Triton stays the compiler: it keeps what it has compiled, and loads it onto the device. The launcher
asks once for every variant, and then launches without Python.
"""

import ctypes
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wsbcn_mm.backends import ops

CHOICES: dict[str, tuple[Any, ...]] = {
    'STATISTICS': ('running', 'estimate', 'batch', 'given'),
    'FORMULA': ('paper', 'var_eps', 'std_eps'),
    'PER_CHANNEL': (False, True),
    'THROUGH_STATISTICS': (False, True),
}
"""Constants that the launcher knows by their place."""


def install() -> bool:
    """Lets the launcher serve CUDA tensors; False where something that it needs is missing.

    Touches no GPU: the driver's library is opened, nothing of it is called.
    """
    if torch.version.cuda is None or not all(addresses()):
        return False
    torch.ops.wsbcn_mm.register_launcher.default(False)
    return True


@functools.cache
def addresses() -> tuple[int, int, int]:
    """Addresses of what starts a kernel, knows the current stream, and knows what captures it.

    The first and the last are of the driver, the second is torch's.
    """
    driver, torch_cuda = 'libcuda.so.1', Path(torch.__file__).parent / 'lib' / 'libtorch_cuda.so'
    return (
        _address(driver, 'cuLaunchKernel'),
        _address(str(torch_cuda), 'aoti_torch_get_current_cuda_stream'),
        # The second form takes more, which the first does not look at.
        _address(driver, 'cuStreamGetCaptureInfo_v2') or _address(driver, 'cuStreamGetCaptureInfo'),
    )


def _address(library: str, function: str) -> int:
    try:
        found = getattr(ctypes.CDLL(library), function)
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0


def launcher() -> list[int]:
    """What the launcher must know, in the order of `Settings` in host/launch.cpp.

    Gives the calling thread the context of the current device, as any call of CUDA's runtime does.
    """
    # Not at the top: Triton is imported when there is the first tensor of a GPU.
    from wsbcn_mm.backends.triton import cuts, weights

    if torch.cuda.is_initialized():
        torch.cuda.mem_get_info()
    return [
        *addresses(),
        cuts.TILE,
        cuts.REDUCING,
        cuts.APPLYING,
        cuts.HELD,
        cuts.HELD_BACKWARD,
        cuts.HELD_AT_ONCE,
        cuts.HELD_SAMPLES,
        weights.AT_ONCE,
        weights.TILE,
    ]


def compile_kernel(
    kernel: str,
    pointers: list[Tensor | None],
    tuples: list[int],
    numbers: list[int],
    names: list[str],
    constants: list[int],
) -> list[int]:
    """A variant of a kernel, on the current device.

    Args:
        kernel: The name of a function of `jit`.
        pointers: Its first arguments; tensors of a value each, where the real ones are.
        tuples: Number and size of the tuples that the first pointers make.
        numbers: Its other arguments.
        names: Of its constants.
        constants: Numbers, or places in `CHOICES`.

    Returns:
        The driver's function, the threads of a program, its shared memory in bytes, and how many
        null pointers the function takes behind its arguments.
    """
    number, size = tuples
    grouped = [tuple(pointers[i * size : (i + 1) * size]) for i in range(number)]
    arguments = [*grouped, *pointers[number * size :], *numbers]
    chosen = {
        name: CHOICES[name][value] if name in CHOICES else value
        for name, value in zip(names, constants)
    }
    return load(_kernels()[kernel], arguments, chosen)


def load(kernel: Any, arguments: list[Any], constants: dict[str, Any]) -> list[int]:
    """Compiles and loads a kernel; see `compile_kernel`."""
    compiled = kernel.warmup(*arguments, grid=(1,), **constants)
    scratch = check_parameters(compiled, arguments)
    from triton.runtime import driver

    # Not `compiled._init_handles()`, which compiles a launcher of Triton's, too: half the time.
    name, shared = compiled.metadata.name, compiled.metadata.shared
    device = torch.cuda.current_device()
    _, function, *_ = driver.active.utils.load_binary(name, compiled.kernel, shared, device)
    # num_warps after compiling: Triton may add some of its own.
    return [function, compiled.metadata.num_warps * 32, shared, scratch]


def check_parameters(compiled: Any, arguments: list[Any]) -> int:
    """How many pointers to memory of its own, that are null here, a compiled kernel takes.

    Raises:
        RuntimeError: it takes other arguments, or is launched in another way, than the launcher
            knows: this Triton is newer.
    """
    expected = [size for argument in arguments for size in _sizes(argument)]
    (declared,) = re.findall(r'\.entry [^(]+\(([^)]*)\)', compiled.asm['ptx'])
    found = [int(bits) // 8 for bits in re.findall(r'\.param \.[busf](\d+)', declared)]
    metadata = compiled.metadata
    special = {
        name: value
        for name, value in metadata._asdict().items()
        if (name in ('global_scratch_size', 'profile_scratch_size') and value)
        or (name in ('launch_cooperative_grid', 'launch_pdl') and value)
        or (name == 'num_ctas' and value != 1)
    }
    extra = found[len(expected) :]
    if found[: len(expected)] != expected or set(extra) > {8} or special:
        raise RuntimeError(
            f'the launcher does not know how this Triton calls kernels: {metadata.name}\n'
            f'  arguments of {expected} bytes, expected by the kernel: {found}; {special}\n'
            '  WSBCN_LAUNCHER=python launches by Triton itself, more slowly'
        )
    return len(extra)


def _sizes(argument: Any) -> Iterator[int]:
    """The bytes of a kernel's parameters for an argument."""
    if isinstance(argument, tuple):
        for part in argument:
            yield from _sizes(part)
    elif isinstance(argument, Tensor):
        yield 8
    elif argument is not None:
        yield 4 if -(2**31) <= argument < 2**31 else 8


@functools.cache
def _kernels() -> dict[str, Callable[..., Any]]:
    from wsbcn_mm.backends.triton.jit import backward, forward, held, statistics, weights

    modules: tuple[ModuleType, ...] = backward, forward, held, statistics, weights
    return {name: kernel for module in modules for name, kernel in vars(module).items()}


ops.implement(launcher, 'CompositeExplicitAutograd')
ops.implement(compile_kernel, 'CompositeExplicitAutograd')
