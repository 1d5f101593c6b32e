"""A run: what is checked before it begins, its folder, and what stands in that at the end."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from gn_det.checkpoint import check_weights_exist
from gn_det.checkpoint.checkpointer import checkpoints_of, last_checkpoint
from gn_det.config import load_config
from gn_det.config.constraints import check_complete_config
from gn_det.config.differences import differences, told
from gn_det.data.datasets import register_folders
from gn_det.engine.command import RunOptions
from gn_det.engine.faults import fault_of
from gn_det.engine.launch import check_processes
from gn_det.engine.run_data import RunData, check_config_data, set_data, wrapped_model
from gn_det.engine.terminal import PrintableFilter
from gn_det.errors import InputError
from gn_det.utils import (
    PARTIAL,
    make_folder,
    reason_of,
    unwritable,
    with_null,
    write_atomically,
    writing,
)

__all__ = [
    "begin_run",
    "check_same_settings",
    "check_start",
    "clear_half_written",
    "holds_run",
    "locked",
    "new_folder",
    "run_folder",
    "set_up_process",
    "study_folder",
    "write_results",
    "written_folder",
]


# What a run writes into its folder before it trains, and what it writes whole.
_BEFORE_TRAINING = (
    ".lock",
    "config.yaml",
    "datasets/*.json",
    "datasets/*.txt",
    "environment.txt",
    "events.out.tfevents.*",
    "log.txt*",
    "metrics.json",
    "recipe.json",
    "run.json",
    "seed.txt",
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


class _Start(NamedTuple):
    """What a config says of the beginning of its run, YAML or LazyConfig."""

    device: str
    ims_per_batch: int
    amp: bool
    weights: str
    freeze_at: int
    from_timm: bool  # whether a backbone of timm brings weights of its own


def begin_run(
    cfg: CfgNode | DictConfig, options: RunOptions, folder: Path, data: RunData | None = None
) -> RunData:
    """Check everything that a run needs, and set and register its data sets.

    In this order: settings that have to fit each other, GPUs and processes, weights, frozen layers,
    annotations and images. Weights that have an address are downloaded.

    Args:
        cfg: a config with the schedule of the run; its data sets are set.
        options: of the command line.
        folder: the run's. What was found in the JSON files, and normalised copies of those that
            need it, are written to ``datasets/`` below.
        data: what another run on the same data sets began with; they are not checked again.

    Returns:
        What the run trains and evaluates on.

    Raises:
        InputError: something that the run would fail on, or silently learn nothing from.
    """
    if not isinstance(cfg, DictConfig):
        check_complete_config(cfg)
    start = _start_of(cfg)
    check_processes(start.device, options, start.ims_per_batch, amp=start.amp)
    if not (options.resume and last_checkpoint(folder)):
        check_weights_exist(start.weights)
        if not options.eval_only and not start.from_timm:
            check_start(start.weights, start.freeze_at)
    if data is None:
        data = check_config_data(cfg, options)
        copies = written_folder(folder, options) / "datasets"
        data.write_copies(copies, write=options.machine_rank == 0)
    set_data(cfg, data)
    if not isinstance(cfg, DictConfig) and options.skip_bad_images:
        cfg.DATALOADER.SKIP_BAD_IMAGES = True
    register_folders(data.folders)
    return data


def _start_of(cfg: CfgNode | DictConfig) -> _Start:
    if isinstance(cfg, DictConfig):
        model = wrapped_model(cfg.model)
        stages = ("backbone.freeze_at", "backbone.bottom_up.freeze_at")
        of_timm = ("backbone.weights", "backbone.bottom_up.weights")
        return _Start(
            cfg.train.device,
            cfg.dataloader.train.total_batch_size,
            cfg.train.amp.enabled,
            cfg.train.init_checkpoint,
            max(OmegaConf.select(model, s, default=0) for s in stages),
            any(OmegaConf.select(model, weights, default="") for weights in of_timm),
        )
    return _Start(
        cfg.MODEL.DEVICE,
        cfg.SOLVER.IMS_PER_BATCH,
        cfg.SOLVER.AMP.ENABLED,
        cfg.MODEL.WEIGHTS,
        cfg.MODEL.BACKBONE.FREEZE_AT,
        bool(cfg.MODEL.TIMM.WEIGHTS),
    )


def check_start(weights: str, freeze_at: int) -> None:
    """Refuse a start from scratch with layers frozen at their random values.

    Detectron's GN R-50-FPN from scratch reached 39.5 box AP in 3x, and 36.2 with two stages frozen.

    Args:
        weights: file or URL to start from; empty for none.
        freeze_at: stages of the backbone that do not train, the stem being the first.

    Raises:
        InputError: there are no weights, and a stage is frozen.
    """
    if not weights and freeze_at > 0:
        raise InputError(
            f"without MODEL.WEIGHTS, MODEL.BACKBONE.FREEZE_AT {freeze_at} freezes random weights; "
            "set it to 0 to train from scratch, or name the weights to start from "
            "(for a LazyConfig, freeze_at of the ResNet and train.init_checkpoint)"
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
    folder = written_folder(path, options)
    # Machines of one run share the folder.
    lock = locked(folder) if options.machine_rank == 0 else nullcontext()
    with _created(path), _created(folder), lock:
        yield path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder for results, created; removed where bad input ends the program before it has begun.

    Raises:
        InputError: it cannot be written, or holds something already.
    """
    if os.path.exists(path) and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists and is no empty folder; name another with --output")
    with _created(path):
        yield path


@contextmanager
def _created(path: Path) -> Iterator[None]:
    existed = os.path.exists(path)
    make_folder(path)
    try:
        yield
    except InputError:
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
    others = differences({"the run": load_config(file), "the config": cfg})
    if others:
        raise InputError(
            f"{folder} holds a run with other settings: {told(others)}. Name another folder with "
            "--output, or remove that one"
        )


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
        file.truncate(0)
        start = datetime.now().isoformat(" ", "seconds")
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
    # What follows goes nowhere, also where the stream is closed in the end.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, handler.stream.fileno())
    os.close(nowhere)
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
            "leave the seed as it was"
        )
    return begun_with


def _read_seed(file: Path) -> int:
    try:
        return int(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} holds no seed; write that of the run there") from error


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
    text = json.dumps(with_null(results), indent=2)
    write_atomically(Path(output_dir) / "results.json", text + "\n")
