"""The folders that programs write: created, kept from other programs, cleared on bad input."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from gn_det.checkpoint.checkpointer import checkpoints_of
from gn_det.config import load_config
from gn_det.config.differences import check_same
from gn_det.engine.command import RunOptions
from gn_det.engine.faults import fault_of
from gn_det.errors import InputError
from gn_det.files import PARTIAL, make_folder, write_json, writing
from gn_det.text import reason_of

__all__ = [
    "check_same_settings",
    "clear_half_written",
    "holds_run",
    "locked",
    "new_folder",
    "run_folder",
    "study_folder",
    "write_results",
    "written_folder",
]

# What a run writes into its folder before it trains, and what it writes whole.
_BEFORE_TRAINING = (
    ".lock",
    "config.yaml",
    "data.json",
    "datasets/*.json",
    "datasets/*.txt",
    "environment.txt",
    "events.out.tfevents.*",
    "log.txt*",
    "metrics.json",
    "recipe.json",
    "run.json",
    "seed.txt",
    "settings.json",
    "unfinished.json",
)
_WRITTEN_WHOLE = (
    "backbone.*",
    "config.yaml",
    "last_checkpoint",
    "model_*.pth",
    "recipe.json",
    "results.json",
    "run.json",
    "seed.txt",
)


@contextmanager
def run_folder(output_dir: str, options: RunOptions) -> Iterator[Path]:
    """The folder of a run, created; removed where bad input ends the run before it has begun.

    Args:
        output_dir: OUTPUT_DIR.
        options: whether a run that is there is resumed or evaluated.

    Raises:
        InputError: it cannot be written, or holds a run that this one would overwrite.
    """
    path = Path(output_dir)
    if not options.resume and not options.eval_only and holds_run(path):
        raise InputError(
            f"{path} holds a run already; --resume continues it, another output folder keeps it"
        )
    # Machines of one run share the folder.
    lock = locked if options.machine_rank == 0 else nullcontext
    with ExitStack() as stack:
        if options.eval_only:
            stack.enter_context(_created(path, nullcontext))
        stack.enter_context(_created(written_folder(path, options), lock))
        yield path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder for results, created; removed where bad input ends the program before it has begun.

    Raises:
        InputError: it cannot be written, holds something already, or another program is at work
            there.
    """
    if os.path.exists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is no empty folder; name another with --output")
    with _created(path, locked):
        yield path


@contextmanager
def _created(path: Path, lock: Callable[[Path], AbstractContextManager[None]]) -> Iterator[None]:
    existed = os.path.exists(path)
    make_folder(path)
    with lock(path), _cleared_on_bad_input(path, existed):
        yield


@contextmanager
def _cleared_on_bad_input(path: Path, existed: bool) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if fault_of(error) is None:
            raise
        if not existed and not holds_run(path) and not any(path.glob("*.pth")):
            for name in _BEFORE_TRAINING:
                for file in path.glob(name):
                    file.unlink()
            for folder in (path / "datasets", path):
                with suppress(OSError):  # it holds something else
                    folder.rmdir()
        raise


def check_same_settings(folder: Path, cfg: CfgNode) -> None:
    """Check that the run in a folder, if there is one, has the settings of a config.

    Raises:
        InputError: it has others, each named with both values, or the folder holds something else.
    """
    file = folder / "config.yaml"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"{folder} holds something that is no run of this program")
        return
    check_same(folder, load_config(file), cfg)


def written_folder(output_dir: str | Path, options: RunOptions) -> Path:
    """Where a program writes: OUTPUT_DIR, or for --eval-only ``evaluation/`` below it.

    So an evaluation leaves the files of the run there alone.
    """
    return Path(output_dir) / "evaluation" if options.eval_only else Path(output_dir)


def holds_run(path: Path) -> bool:
    """Whether a run has left metrics or a checkpoint in a folder."""
    # os.path, since Path.exists raises where the folder may not be read.
    metrics = os.path.join(path, "metrics.json")
    has_metrics = os.path.exists(metrics) and os.path.getsize(metrics) > 0
    has_checkpoint = os.path.exists(os.path.join(path, "last_checkpoint"))
    return has_metrics or has_checkpoint or bool(checkpoints_of(path))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, until this one leaves the context or ends.

    Raises:
        InputError: one does already; with its machine, process and start.
    """
    make_folder(folder)
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise InputError(
                f"another program is at work in {folder}: {file.read(200).strip() or 'unknown'}"
            ) from error
        except OSError as error:  # a file system without locks
            print(f"{folder} cannot be locked ({reason_of(error)}): let no other run write there")
        start = datetime.now().isoformat(" ", "seconds")
        with writing(folder / ".lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {start}\n")
            file.flush()
        yield


@contextmanager
def study_folder(path: Path) -> Iterator[None]:
    """A folder of several runs, below ``runs/``, that one program at a time works in.

    What is there is continued.

    Raises:
        InputError: another program is at work there, or it is the folder of a run itself.
    """
    if holds_run(path):
        raise InputError(
            f"{path} holds a run itself, not runs below it; name another folder with --output"
        )
    with locked(path):
        yield


def clear_half_written(output_dir: Path) -> None:
    """Remove what a killed process left half-written in the folder of a run."""
    for name in _WRITTEN_WHOLE:
        for file in output_dir.glob(name + PARTIAL):
            file.unlink()
    metrics = output_dir / "metrics.json"
    if metrics.exists():
        with writing(metrics), open(metrics, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def write_results(output_dir: str, results: Mapping[str, Any]) -> None:
    """Write the evaluation of a finished run to ``results.json``; what is undefined is null."""
    write_json(Path(output_dir) / "results.json", results)
