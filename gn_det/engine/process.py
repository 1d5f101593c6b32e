"""What every process of a run begins with: its loggers and its seed."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from gn_det.checkpoint.checkpointer import last_checkpoint
from gn_det.engine.faults import fault_of
from gn_det.engine.folders import clear_half_written
from gn_det.engine.terminal import PrintableFilter, discard
from gn_det.errors import InputError
from gn_det.files import unwritable, write_atomically

__all__ = ["set_up_process"]


def set_up_process(
    output_dir: str | Path, seed: int, cudnn_benchmark: bool = False, *, resume: bool = False
) -> int:
    """Start the loggers and seed this process, as Detectron2's default_setup does.

    The environment goes to ``environment.txt``, not to the console, the seed to ``seed.txt``. What
    a killed process left half-written in the folder is cleared away.

    Args:
        output_dir: where ``log.txt`` goes.
        seed: the same for every process; each adds its rank. Negative: a random one, or that of
            the run which is resumed.
        cudnn_benchmark: for torch.backends.cudnn.
        resume: whether the run goes on from a checkpoint, where there is one.

    Returns:
        The run's seed, the same in all its processes and whenever it is resumed.

    Raises:
        InputError: the run that is resumed began with another seed.
    """
    rank = comm.get_rank()
    for name in ("fvcore", "detectron2", "gn_det"):
        logger = setup_logger(str(output_dir), distributed_rank=rank, name=name)
        for handler in logger.handlers:
            handler.addFilter(PrintableFilter())
            if isinstance(handler, logging.StreamHandler):
                handler.handleError = partial(_go_on_without, handler)
    seed = _run_seed(Path(output_dir), seed, resume)
    if comm.is_main_process():
        clear_half_written(Path(output_dir))
        write_atomically(Path(output_dir) / "environment.txt", collect_env_info() + "\n")
        write_atomically(Path(output_dir) / "seed.txt", f"{seed}\n")
    seed_all_rng(seed + rank)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    return seed


def _go_on_without(handler: logging.StreamHandler, record: logging.LogRecord) -> None:
    """Let a run go on whose log cannot be written, and say so once."""
    error = sys.exc_info()[1]
    if not isinstance(error, OSError):
        if fault_of(error) is None:  # else a signal of a loading process came in the writing
            logging.Handler.handleError(handler, record)
        return
    discard(handler.stream)
    name = getattr(handler.stream, "name", "the log")
    print(f"{unwritable(name, error)}; the run goes on without it", file=sys.stderr)


def _run_seed(output_dir: Path, seed: int, resume: bool) -> int:
    file = output_dir / "seed.txt"
    resumes = resume and last_checkpoint(output_dir) and file.exists()
    mine = _read_seed(file) if resumes else None, np.random.randint(2**31)
    begun_with, drawn = comm.all_gather(mine)[0]
    if begun_with is None:
        return seed if seed >= 0 else drawn
    if 0 <= seed != begun_with:
        raise InputError(
            f"{output_dir} began with the seed {begun_with} and cannot go on with {seed}; "
            f"set it to {begun_with}, or to -1 for that of the run"
        )
    return begun_with


def _read_seed(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} holds no seed; write that of the run there") from error
