"""What tests share besides fixtures: the tools as programs and as modules."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
