"""What every section of the benchmark is told, and what it can say."""

import sys
import time
from dataclasses import dataclass, field

import torch


@dataclass
class Settings:
    """The command line, digested.

    Attributes:
        end: When nothing more is begun, on the clock of `time.monotonic`.
        left_out: What was not begun then.
    """

    device: torch.device
    dtypes: list[torch.dtype]
    layouts: list[str]
    repeats: int
    quick: bool
    end: float = float('inf')
    left_out: list[str] = field(default_factory=list)

    def begins(self, what: str) -> bool:
        """Whether there is time for it; says so, or notes it among what was left out."""
        if time.monotonic() > self.end:
            self.left_out.append(what)
            return False
        show_progress(what)
        return True


class Skipped(Exception):
    """A section cannot run here; the message says why."""


def name_of(dtype: torch.dtype) -> str:
    """``torch.float32`` as ``float32``."""
    return str(dtype).removeprefix('torch.')


def show_progress(text: str) -> None:
    """A line on stderr."""
    print(f'{time.strftime("%H:%M:%S")}  {text}', file=sys.stderr, flush=True)
