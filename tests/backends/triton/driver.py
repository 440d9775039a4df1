"""A driver without a GPU: Triton's interpreter runs what the launcher in C++ starts.

It stands behind the launcher's two doors: it loads kernels (`variants.load`) and launches them
(cuLaunchKernel), with the very parameters that the GPU would get.
"""

import ctypes
from typing import Any, NamedTuple

import torch

from wsbcn_mm.backends.carriers import Affine, Running, Statistics, flat_rate
from wsbcn_mm.backends.ops import OPERATORS
from wsbcn_mm.backends.schemas import SCHEMAS
from wsbcn_mm.backends.triton import variants

NAMESPACE = 'wsbcn_mm_launcher'
_library = torch.library.Library(NAMESPACE, 'DEF')
for _schema in SCHEMAS:
    if _schema.partition('(')[0] in OPERATORS:
        _library.define(_schema)

pointer, number = ctypes.c_void_p, ctypes.c_uint
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int, pointer, *[number] * 7, pointer, ctypes.POINTER(pointer), pointer
)


class Launch(NamedTuple):
    """One launch: pointers are only known to be there or not."""

    kernel: str
    grid: tuple[int, int]
    arguments: list[Any]
    constants: dict[str, Any]


def launch_of(kernel, grid, arguments, constants):
    grid = (*grid, 1)[:2]
    return Launch(kernel.__name__, grid, [_kind(argument) for argument in arguments], constants)


def _kind(argument):
    if isinstance(argument, tuple):
        return tuple(_kind(part) for part in argument)
    return argument.dtype if isinstance(argument, torch.Tensor) else argument


class Driver:
    """Runs what it is asked to launch, and remembers it."""

    def __init__(self):
        self.launches: list[Launch] = []
        self.error: BaseException | None = None
        self.results: list[int] = []  # of the next calls of cuLaunchKernel; then 0
        self._loaded: list[tuple[Any, list[Any], dict[str, Any]]] = []
        self._launch = LAUNCH(self._run)
        self.address = ctypes.cast(self._launch, pointer).value

    def load(self, kernel, arguments, constants):
        self._loaded.append((kernel, arguments, constants))
        return [len(self._loaded), 32 * constants['num_warps'], 0, 0]

    def _run(self, function, *launched):
        x, y, *others, parameters, extra = launched
        try:
            kernel, examples, constants = self._loaded[function - 1]
            assert others == [1, 32 * constants['num_warps'], 1, 1, 0, None] and extra is None
            places = iter(parameters)
            arguments = [_read(example, places) for example in examples]
            self.launches.append(launch_of(kernel, (x, y), arguments, constants))
            kernel[x, y](*arguments, **constants)
        except BaseException as error:  # noqa: BLE001  # C++ calls: the test raises it
            self.error = error
        return self.results.pop(0) if self.results else 0


def _read(example, places):
    """The argument whose parameters come next; the example has its type."""
    if example is None:
        return None
    if isinstance(example, tuple):
        return tuple(_read(part, places) for part in example)
    place = next(places)
    if isinstance(example, int):
        kind = ctypes.c_int32 if -(2**31) <= example < 2**31 else ctypes.c_int64
        return kind.from_address(place).value
    address = pointer.from_address(place).value
    value = (ctypes.c_byte * example.element_size()).from_address(address)
    return torch.frombuffer(value, dtype=example.dtype)


def call(operator, *arguments):
    """An operator of the launcher, with the arguments that `launch` takes."""
    if operator.startswith('normalize_with'):
        *first, rate, eps = arguments
        arguments = (*first, *flat_rate(rate), eps)
    flat = []
    for argument in arguments:
        carried = isinstance(argument, (Running, Affine, Statistics))
        flat.extend(argument if carried else [argument])
    return getattr(getattr(torch.ops, NAMESPACE), operator).default(*flat)


def use(driver, monkeypatch):
    """Puts a driver behind the launcher, until the test ends."""
    from tests.backends.triton import interpreter  # Triton, which must know that it interprets

    interpreter.patch_once_per_launch()
    monkeypatch.setattr(variants, 'load', driver.load)
    monkeypatch.setattr(variants, 'addresses', lambda: (driver.address, 0, 0))
    torch.ops.wsbcn_mm.reset_launcher.default()
