"""The folder of a run: may it be written, what stands in it from the start, what at the end."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger

from gn_det.errors import InputError
from gn_det.utils import PARTIAL, make_folder, write_atomically

__all__ = [
    "clear_half_written",
    "holds_run",
    "locked",
    "run_folder",
    "set_up_process",
    "with_null",
    "write_results",
    "written_folder",
]


@contextmanager
def run_folder(output_dir: str, args: argparse.Namespace) -> Iterator[Path]:
    """The folder of a run, created; gone again where bad input ends the run before it has begun.

    Args:
        output_dir: OUTPUT_DIR.
        args: with resume and eval_only.

    Raises:
        InputError: it cannot be written, or holds a run that this one would overwrite.
    """
    path = Path(output_dir)
    existed = os.path.exists(path)
    if existed and not args.resume and not args.eval_only and holds_run(path):
        raise InputError(
            f"{path} holds a run already; --resume goes on with it, "
            "another OUTPUT_DIR keeps it (train.output_dir for a LazyConfig)"
        )
    make_folder(path)
    try:
        yield path
    except InputError:
        if not existed and not holds_run(path):
            shutil.rmtree(path)
        raise


def written_folder(output_dir: str | Path, args: argparse.Namespace) -> Path:
    """Where a program writes: OUTPUT_DIR, or for --eval-only ``evaluation/`` below it.

    So an evaluation leaves the files of the run there alone.
    """
    return Path(output_dir) / "evaluation" if args.eval_only else Path(output_dir)


def holds_run(path: Path) -> bool:
    """Whether a run has left metrics or a checkpoint in a folder."""
    # os.path, since Path.exists raises where the folder may not be read.
    metrics = os.path.join(path, "metrics.json")
    has_metrics = os.path.exists(metrics) and os.path.getsize(metrics) > 0
    return has_metrics or os.path.exists(os.path.join(path, "last_checkpoint"))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder.

    Raises:
        InputError: one does already.
    """
    make_folder(folder)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another program is at work in {folder}") from error
        yield


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
        setup_logger(str(output_dir), distributed_rank=rank, name=name)
    seed = _run_seed(Path(output_dir), seed, resume)
    if comm.is_main_process():
        clear_half_written(Path(output_dir))
        (Path(output_dir) / "environment.txt").write_text(collect_env_info() + "\n")
        write_atomically(Path(output_dir) / "seed.txt", f"{seed}\n")
    seed_all_rng(seed + rank)
    torch.backends.cudnn.benchmark = cudnn_benchmark
    return seed


def _run_seed(output_dir: Path, seed: int, resume: bool) -> int:
    file = output_dir / "seed.txt"
    resumes = resume and (output_dir / "last_checkpoint").exists() and file.exists()
    mine = int(file.read_text()) if resumes else None, np.random.randint(2**31)
    begun_with, drawn = comm.all_gather(mine)[0]
    if begun_with is None:
        return seed if seed >= 0 else drawn
    if 0 <= seed != begun_with:
        raise InputError(
            f"{output_dir} began with the seed {begun_with} and cannot go on with {seed}; "
            "leave the seed as it was"
        )
    return begun_with


def clear_half_written(output_dir: Path) -> None:
    """Remove what a killed process left half-written in the folder of a run."""
    for partial in output_dir.glob(f"*{PARTIAL}"):
        partial.unlink()
    metrics = output_dir / "metrics.json"
    if metrics.exists():
        with open(metrics, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write_results(output_dir: str, results: Mapping[str, Any]) -> None:
    """Write the evaluation of a finished run to ``results.json``; what is undefined is null."""
    text = json.dumps(with_null(results), indent=2)
    write_atomically(Path(output_dir) / "results.json", text + "\n")


def with_null(value: Any) -> Any:
    """Results for JSON, which has no NaN: what is undefined is None."""
    if isinstance(value, Mapping):
        return {key: with_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
