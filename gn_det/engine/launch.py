"""Starting one process, or several: one for each GPU, or sharing the cores of the CPU.

Several are started here, or by torchrun: then rank 0 runs the program, and the others follow it.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from gn_det.engine.command import RunOptions
from gn_det.engine.faults import telling_faults
from gn_det.engine.termination import (
    TERMINATED,
    catch_ending,
    end_loading_processes,
    end_with_parent,
    release_ending,
    say_ending,
    starting_processes,
)
from gn_det.errors import InputError

__all__ = [
    "check_device",
    "check_processes",
    "follow",
    "launch",
    "torchrun_rank",
    "with_torchrun",
]

_SECONDS_TO_SAVE = 600
_CPU = "MODEL.DEVICE cpu (train.device=cpu for a LazyConfig)"


def check_device(device: str, cpu: str = _CPU) -> torch.device:
    """Parse a device and check that PyTorch has it.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".
        cpu: how the program's user chooses the CPU, for the error.

    Raises:
        InputError: it is no device of PyTorch's, or a GPU that is not there.
    """
    try:
        parsed = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device {device!r} is no device of PyTorch's") from error
    if parsed.type == "meta":
        raise InputError(f"device meta computes nothing; set {cpu}, or name a GPU")
    gpus = torch.cuda.device_count()
    if parsed.type == "cuda" and (parsed.index or 0) >= gpus:
        raise InputError(
            f"device {device} is asked for, and PyTorch sees {gpus} GPUs; to use the CPU, set {cpu}"
        )
    return parsed


def check_processes(
    device: str, options: RunOptions, ims_per_batch: int, *, amp: bool, cpu: str = _CPU
) -> None:
    """Refuse what cannot be launched, before anything is.

    Args:
        device: such as "cpu", "cuda" or "cuda:1".
        options: how many processes, and whether they train.
        ims_per_batch: images per step over all processes.
        amp: whether Detectron2's mixed precision is on, which needs a GPU.
        cpu: see :func:`check_device`.

    Raises:
        InputError: a GPU that is not there, fewer GPUs than --num-gpus, one numbered GPU for
            several processes; for training, images that do not divide evenly, or mixed precision
            on the CPU.
    """
    if options.num_gpus < 1 or options.num_machines < 1:
        raise InputError("--num-gpus and --num-machines must be at least 1")
    parsed = check_device(device, cpu)
    gpus = torch.cuda.device_count()
    if parsed.type == "cuda" and options.num_gpus > gpus:
        raise InputError(
            f"--num-gpus {options.num_gpus}, and PyTorch sees {gpus} GPUs; or use the CPU: {cpu}"
        )
    world_size = options.world_size
    if parsed.type == "cuda" and parsed.index is not None and world_size > 1:
        raise InputError(f"device {device} cannot serve {world_size} processes; say cuda")
    if options.num_machines > 1 and options.dist_url == "auto" and torchrun_rank() is None:
        raise InputError(
            f"--num-machines {options.num_machines}: name the place where they meet, the same on "
            "each, with --dist-url tcp://FIRST_MACHINE:PORT"
        )
    if options.eval_only:
        return
    if amp and parsed.type == "cpu":
        raise InputError(
            "mixed precision needs a GPU; turn it off with SOLVER.AMP.ENABLED False "
            "(train.amp.enabled=False for a LazyConfig)"
        )
    if ims_per_batch < world_size or ims_per_batch % world_size:
        raise InputError(
            f"{ims_per_batch} images per step do not divide among {world_size} processes; "
            "set SOLVER.IMS_PER_BATCH (dataloader.train.total_batch_size for a LazyConfig) "
            "to a multiple"
        )


def torchrun_rank() -> int | None:
    """This process's rank where torchrun has started it, else None."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else None


def with_torchrun(options: RunOptions) -> RunOptions:
    """Options with torchrun's numbers of GPUs and machines, if that has started this process."""
    if torchrun_rank() is None:
        return options
    num_gpus = int(os.environ["LOCAL_WORLD_SIZE"])
    num_machines = int(os.environ["WORLD_SIZE"]) // num_gpus
    return replace(options, num_gpus=num_gpus, num_machines=num_machines)


def launch(main: Callable[..., Any], device: str, options: RunOptions, *main_args: Any) -> None:
    """Run main(*main_args) in options.num_gpus processes on this machine.

    On the CPU the processes talk over gloo and share the cores. A signal that ends this process is
    passed on to all of them as SIGTERM, and where this process is killed, so are they. Under
    torchrun the processes exist already, and wait in :func:`follow`.

    Raises:
        InputError: raised by main in any process, a process was killed, or the CPU is asked for
            under torchrun where there are GPUs.
    """
    parsed = torch.device(device)
    on_cpu = parsed.type == "cpu"
    if on_cpu and not torch.cuda.is_available():
        print("Running on the CPU: PyTorch sees no GPU.")
    if torchrun_rank() is not None:
        if on_cpu and torch.cuda.is_available():
            raise InputError(
                f"device {device}: torchrun's processes use the GPUs that they see; hide them with "
                "CUDA_VISIBLE_DEVICES="
            )
        _lead(main, main_args)
        return
    several = options.world_size > 1
    token = secrets.token_hex() if options.num_machines == 1 else None
    if on_cpu and several:
        # Detectron2 would pick NCCL wherever a process sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if parsed.type == "cuda" and parsed.index is not None:
        torch.cuda.set_device(parsed)
    threads = max(1, torch.get_num_threads() // options.num_gpus) if on_cpu else None
    if not several:
        _in_process(main, main_args, threads)
        return
    try:
        _launch_several(options, (main, main_args, threads, token))
    except ProcessRaisedException as raised:
        # All that comes back from a process is its traceback, as text.
        last_line = str(raised).strip().splitlines()[-1]
        prefix = f"{InputError.__module__}.{InputError.__qualname__}: "
        if last_line.startswith(prefix):
            raise InputError(last_line.removeprefix(prefix)) from None
        raise
    except ProcessExitedException as exited:
        if exited.exit_code in (TERMINATED, -signal.SIGTERM):
            sys.exit(TERMINATED)
        raise InputError(
            f"process {exited.error_index} ended with {exited.signal_name or exited.exit_code}; "
            "SIGKILL often means that memory was short: try fewer images or processes"
        ) from None


def _launch_several(options: RunOptions, work: tuple[Any, ...]) -> None:
    """Run work in processes, and wait for all of them; see :func:`_in_process`."""
    context: mp.ProcessContext | None = None
    status = 0

    def pass_on() -> None:
        for process in context.processes if context else ():
            process.terminate()

    def on_ending(ending: int) -> None:
        nonlocal status
        status = ending
        say_ending(status)
        pass_on()

    before = catch_ending(on_ending)
    try:
        url = f"tcp://127.0.0.1:{_free_port()}" if options.dist_url == "auto" else options.dist_url
        with starting_processes():
            context = mp.start_processes(
                _work_as_rank, (os.getpid(), options, url, work), options.num_gpus, join=False
            )
        if status:
            pass_on()
        # Each has a checkpoint to finish, but where one fails by itself the others wait for it.
        while not context.join(1, grace_period=_SECONDS_TO_SAVE if status else None):
            pass
    except (ProcessExitedException, ProcessRaisedException):
        if not status:
            raise
    finally:
        for process in context.processes if context else ():
            process.kill()
        release_ending(before)
    if status:
        sys.exit(status)


def _work_as_rank(
    local_rank: int, parent: int, options: RunOptions, url: str, work: tuple[Any, ...]
) -> None:
    end_with_parent(parent)
    # A loading process that is forked takes little memory and time; here the default is to spawn.
    multiprocessing.set_start_method("fork", force=True)
    rank = options.machine_rank * options.num_gpus + local_rank
    _join(local_rank, options.num_gpus, init_method=url, rank=rank, world_size=options.world_size)
    try:
        _in_process(*work)
    except InputError as error:  # by its last line, launch knows it from defects
        raise InputError(str(error)) from error


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def follow() -> None:
    """Under torchrun, run what rank 0 launches, in a process of another rank."""
    _join_torchrun()
    work: list[Any] = [None, None]
    dist.broadcast_object_list(work)
    _in_process(*work)


def _lead(main: Callable[..., Any], main_args: tuple[Any, ...]) -> None:
    _join_torchrun()
    dist.broadcast_object_list([main, main_args])
    _in_process(main, main_args)


def _join_torchrun() -> None:
    _join(int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))


def _join(local_rank: int, local_world_size: int, **kwargs: Any) -> None:
    """Enter the process group of the run, and Detectron2's of the machine."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=DEFAULT_TIMEOUT, **kwargs)
    comm.create_local_process_group(local_world_size)
    comm.synchronize()


def _in_process(
    main: Callable[..., Any],
    main_args: tuple[Any, ...],
    threads: int | None = None,
    token: str | None = None,
) -> None:
    """Run main in this process.

    Args:
        main, main_args: see :func:`launch`.
        threads: of PyTorch.
        token: that all processes of this run have; None where they were started apart.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if len({*comm.all_gather(token)}) > 1:
        raise InputError(
            "processes of two runs have met at one address; start them again, each with a "
            "--dist-url of its own, or without"
        )
    try:
        with telling_faults():
            main(*main_args)
    finally:
        end_loading_processes()
    if dist.is_initialized():
        dist.destroy_process_group()
