"""A comparison of norms: the runs of its matrix, what is equal in them, and getting them done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from gn_det.config import dump_config
from gn_det.config.differences import differences, format_differences
from gn_det.engine.folders import check_same_settings
from gn_det.engine.termination import (
    ENDS_WITH_PARENT,
    INTERRUPTED,
    TERMINATED,
    catch_ending,
    end,
    end_with_parent,
    release_ending,
)
from gn_det.errors import InputError
from gn_det.files import make_folder, write_atomically

__all__ = ["Run", "check_comparable", "check_folders", "run_all"]

# Where a recipe may say which norm is where, and what comes with the weights of its classifier.
_NORM_KEYS = re.compile(r"MODEL\.GN\..*|.*\.NORM")
_COMPONENTS = re.compile(r"MODEL\.META_ARCHITECTURE|.*\.(NAME|HEAD_NAME)")
_START_KEYS = re.compile(
    r"MODEL\.(WEIGHTS|TIMM\.WEIGHTS|RESNETS\.STRIDE_IN_1X1|PIXEL_MEAN|PIXEL_STD)"
)


@dataclass(frozen=True)
class Run:
    """One run of the matrix.

    Attributes:
        recipe: stem of the config file.
        ims_per_gpu: images on each GPU at a time.
        seed: of the run.
        cfg: its whole config, as it trains.
        lr: the learning rate of the reference, where it is one of several.
    """

    recipe: str
    ims_per_gpu: int
    seed: int
    cfg: CfgNode
    lr: float | None = None

    @property
    def name(self) -> str:
        name = f"{self.recipe}-{self.ims_per_gpu}ims-seed{self.seed}"
        return name if self.lr is None else f"{name}-lr{self.lr:g}"

    @property
    def folder(self) -> Path:
        return Path(self.cfg.OUTPUT_DIR)

    @property
    def finished(self) -> bool:
        return (self.folder / "results.json").exists()

    @property
    def iterations_done(self) -> int:
        """Iterations that metrics.json tells of; all of a finished run."""
        if self.finished:
            return self.cfg.SOLVER.MAX_ITER
        try:
            lines = (self.folder / "metrics.json").read_text(encoding="utf-8").splitlines()
            return min(json.loads(lines[-1])["iteration"] + 1, self.cfg.SOLVER.MAX_ITER)
        except (OSError, ValueError, LookupError, TypeError):
            return 0

    @property
    def failure(self) -> str:
        """The last line that an unfinished run said."""
        said = (self.folder / "console.txt").read_text(encoding="utf-8", errors="replace")
        lines = said.strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def check_comparable(configs: Mapping[str, CfgNode]) -> None:
    """Refuse recipes that differ in more than the norm.

    They may differ in where they have which norm and in the weights that they start from, with what
    belongs to those (stride, pixel mean and standard deviation), but all or none start from some.

    Args:
        configs: by recipe.

    Raises:
        InputError: naming each other setting in which they differ, with its values.
    """
    others = {
        key: values for key, values in differences(configs).items() if not _is_of_norm(key, values)
    }
    if others:
        raise InputError(
            f"the recipes differ in more than the norm: {format_differences(others)}. Set it "
            "in each alike, or show one of them with --beside"
        )


def check_folders(runs: Sequence[Run]) -> None:
    """Check that no two runs share a folder, and that what is there has the same settings.

    Raises:
        InputError: naming the run, and for other settings their keys and values.
    """
    twice = [name for name, count in Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise InputError(f"the matrix has {twice[0]} twice, which would share a folder")
    for run in runs:
        check_same_settings(run.folder, run.cfg)


def run_all(runs: Sequence[Run], train_net: Path, jobs: int, num_gpus: int) -> dict[str, str]:
    """Train and evaluate what is not finished, going on with what was interrupted.

    Args:
        runs: of the matrix.
        train_net: tools/train_net.py.
        jobs: runs at a time; they share the threads that PyTorch has here.
        num_gpus: of each run.

    Returns:
        By name of a run that failed, the last line that it said.
    """
    waiting = [run for run in runs if not run.finished]
    working: dict[subprocess.Popen, Run] = {}
    before = catch_ending(end)
    failures: dict[str, str] = {}
    total = sum(run.cfg.SOLVER.MAX_ITER * run.cfg.SOLVER.IMS_PER_BATCH for run in runs)
    often = 1 if sys.stderr.isatty() else 60  # seconds; a log keeps every line
    with tqdm(
        total=total, initial=_images_done(runs), unit="image", desc="comparison", smoothing=0.05,
        mininterval=often, maxinterval=often,
    ) as progress:  # fmt: skip
        try:
            while waiting or working:
                while waiting and len(working) < jobs:
                    run = waiting.pop(0)
                    working[_start(run, train_net, jobs, num_gpus)] = run
                time.sleep(1)
                for process in [p for p in working if p.poll() is not None]:
                    run = working.pop(process)
                    if process.returncode in (INTERRUPTED, TERMINATED, -signal.SIGTERM):
                        sys.exit(TERMINATED)  # whoever ends one run ends them all
                    if not run.finished:
                        failures[run.name] = run.failure
                        progress.write(f"{run.name} failed: {run.failure}")
                names = ", ".join(run.name for run in working.values())
                progress.set_postfix_str(names, refresh=False)
                progress.update(_images_done(runs) - progress.n)
        finally:
            for process in working:  # each saves a checkpoint
                process.send_signal(signal.SIGTERM)
            for process in working:
                process.wait()
            release_ending(before)
    return failures


def _start(run: Run, train_net: Path, jobs: int, num_gpus: int) -> subprocess.Popen:
    make_folder(run.folder)
    config = run.folder / "config.yaml"
    write_atomically(config, dump_config(run.cfg))
    threads = max(1, torch.get_num_threads() // jobs)
    with open(run.folder / "console.txt", "a") as console:
        return subprocess.Popen(
            [
                sys.executable, train_net, "--config-file", config, "--resume",
                "--num-gpus", str(num_gpus),
            ],
            stdout=console,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), ENDS_WITH_PARENT: "1"},
            start_new_session=True,  # Ctrl-C reaches this process, which ends the others in peace
            preexec_fn=partial(end_with_parent, os.getpid(), signal.SIGTERM),
        )  # fmt: skip


def _images_done(runs: Sequence[Run]) -> int:
    return sum(run.iterations_done * run.cfg.SOLVER.IMS_PER_BATCH for run in runs)


def _is_of_norm(key: str, values: Mapping[str, Any]) -> bool:
    if _NORM_KEYS.fullmatch(key):
        return True
    if _COMPONENTS.fullmatch(key):  # gn_det's entries are Detectron2's with GN
        return len({re.sub("^GN|gn_", "", str(value)) for value in values.values()}) == 1
    if key in ("MODEL.WEIGHTS", "MODEL.TIMM.WEIGHTS"):
        return all(values.values())
    return bool(_START_KEYS.fullmatch(key))
