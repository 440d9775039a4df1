"""What the command lines of several tools share: OpenMMLab's arguments, errors in one line."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import DictAction

from wsbcn_mm.openmmlab import compat

# What a mistake of the user raises; anything else is a defect and keeps its traceback.
USER_ERRORS = (ValueError, ImportError, OSError, compat.DataError)


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--cfg-options``."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='override settings of the config: a.b.c=value, key="[a,b]", key="[(a,b),(c,d)]"',
    )


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """Adds ``--launcher`` and the ``--local-rank`` that torch.distributed.launch passes."""
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how the processes were started',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parses a command line with a launcher; mmengine reads the rank from the environment."""
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the program with ``error: ...`` and exit code 1 where the user made a mistake."""
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f'error: {error}')
