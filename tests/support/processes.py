"""Tests in several processes."""

from __future__ import annotations

import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(function: Callable[..., None], *args: object) -> None:
    """Call ``function(rank, *args)`` in both processes of a group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_in_process, (port, function, args), nprocs=2)


def _in_process(rank: int, port: int, function: Callable[..., None], args: tuple) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    torch.set_num_threads(1)
    function(rank, *args)
    dist.destroy_process_group()
