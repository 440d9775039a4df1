"""Two ranks: processes that a server forks, which has imported for both what takes seconds."""

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from tests.tool import go_on_at_the_end_of_data, leave_configs_unformatted

# One that cannot be imported is left out.
IMPORTED = ['torch._dynamo', 'torch.distributed.fsdp', 'wsbcn_mm', 'wsbcn_mm.openmmlab']
IMPORTED += ['mmdet.models', 'mmdet.datasets', 'mmdet.evaluation', 'mmdet.visualization']


def in_two_ranks(function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` answers in each rank, which has one thread.

    The environment is that of a launcher; a function that communicates makes the process group.
    """
    multiprocessing.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = (port, folder, function, arguments)
        torch.multiprocessing.start_processes(_rank, given, nprocs=2, start_method='forkserver')
        return [torch.load(f'{folder}/{rank}.pt', weights_only=False) for rank in (0, 1)]


def _rank(
    rank: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    leave_configs_unformatted()
    go_on_at_the_end_of_data()
    torch.save(function(rank, *arguments), f'{folder}/{rank}.pt')
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # torch 2.6 may wait for ever for a rank that has gone
        torch.distributed.destroy_process_group()
