"""What tests share besides fixtures: the tools as programs and as modules."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parents[2]

# Config overrides that make a training run a matter of seconds.
TINY = ["SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "DATALOADER.NUM_WORKERS", "0"]


def folder_flags(folder: Path) -> list[str]:
    """--train and --val of a generated folder."""
    images = str(folder / "images")
    train, val = str(folder / "train.json"), str(folder / "val.json")
    return ["--train", train, images, "--val", val, images]


def load_program(path: str) -> ModuleType:
    """A program of tools/ or demo/ as a module, its main not run."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(path: str, *args: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    """Run a program as a user would; its output is captured."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / path), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **kwargs)


def preloaded_context() -> BaseContext:
    """A context whose processes have imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "support.programs",
            "gn_det.engine.trainer",
            "gn_det.engine.run",
            "gn_det.plots.curves",
            "torchvision",
            "cv2",
        ]
    )
    return context


def run_forked(program: str, arguments: Sequence[str], output: Path, seconds: int = 60) -> int:
    """Run a program without its imports, which a process that is forked for it has done already.

    It sees no GPU.

    Args:
        program: its path in the repository.
        arguments: of the command line.
        output: file for what it prints.
        seconds: after which a program that is still at work is killed.

    Returns:
        The exit status; that of a killed program is negative.
    """
    process = preloaded_context().Process(target=_run_as_main, args=(program, arguments, output))
    process.start()
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def _run_as_main(program: str, arguments: Sequence[str], output: Path) -> None:
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [program, *arguments]
    torch.cuda.device_count = lambda: 0
    runpy.run_path(str(ROOT / program), run_name="__main__")


def build_wheel(folder: Path) -> Path:
    """gn_det's wheel in folder, built from a copy of the checkout."""
    copy = folder / "checkout"
    for name in ("gn_det", "configs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "README.md"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", str(copy), "--no-deps", "--quiet"]
    subprocess.run([*command, "--no-build-isolation", "--wheel-dir", str(folder)], check=True)
    return next(folder.glob("gn_det-*.whl"))
