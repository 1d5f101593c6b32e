"""Starting one process, or one process per GPU (per CPU share with MODEL.DEVICE cpu)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

import detectron2.engine
import torch
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

from gn_det.engine.command import run_command
from gn_det.errors import InputError

__all__ = ["check_processes", "launch"]


def check_processes(
    device: str, args: argparse.Namespace, ims_per_batch: int, *, amp: bool
) -> None:
    """Refuse what cannot be launched, before anything is.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".
        args: with num_gpus and num_machines.
        ims_per_batch: images a step over all processes.
        amp: whether Detectron2's mixed precision is on, which needs a GPU.

    Raises:
        InputError: a GPU that is not there, fewer GPUs than --num-gpus, images that do not divide
            evenly, or mixed precision on the CPU.
    """
    if args.num_gpus < 1 or args.num_machines < 1:
        raise InputError("--num-gpus and --num-machines must be at least 1")
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError as error:
        raise InputError(f"device {device!r} is no device of PyTorch's") from error
    gpus = torch.cuda.device_count()
    if kind == "cuda" and max(args.num_gpus, (index or 0) + 1) > gpus:
        raise InputError(
            f"device {device} with --num-gpus {args.num_gpus}, and PyTorch sees {gpus} GPUs; lower "
            "--num-gpus, or use the CPU: MODEL.DEVICE cpu (train.device=cpu for a LazyConfig)"
        )
    if amp and kind == "cpu":
        raise InputError(
            "mixed precision needs a GPU; turn it off with SOLVER.AMP.ENABLED False "
            "(train.amp.enabled=False for a LazyConfig)"
        )
    world_size = args.num_gpus * args.num_machines
    if ims_per_batch < world_size or ims_per_batch % world_size:
        raise InputError(
            f"{ims_per_batch} images a step do not divide among {world_size} processes; "
            "set SOLVER.IMS_PER_BATCH (dataloader.train.total_batch_size for a LazyConfig) "
            "to a multiple"
        )


def launch(main: Callable[..., Any], device: str, args: argparse.Namespace, *main_args: Any) -> int:
    """Run main(*main_args) in args.num_gpus processes on this machine; return the exit status.

    On the CPU the processes talk over gloo.
    """
    if device == "cpu" and not torch.cuda.is_available():
        print("Running on the CPU: PyTorch sees no GPU.")
    if device == "cpu" and args.num_gpus * args.num_machines > 1:
        # Detectron2 would pick NCCL wherever a process sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        detectron2.engine.launch(
            _in_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, main_args),
        )
    except ProcessExitedException as exited:
        return exited.exit_code
    return 0


def _in_process(main: Callable[..., Any], main_args: tuple[Any, ...]) -> None:
    if comm.get_world_size() == 1:
        main(*main_args)
    else:
        run_command(lambda: main(*main_args))
