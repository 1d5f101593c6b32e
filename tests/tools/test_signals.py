"""What ends a program, at which moment, and what it leaves: a table of drills."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.programs import ROOT, folder_flags

INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
STATUS = {INT: 130, TERM: 143, HUP: 143}
SECONDS = 60  # a bound on hanging

# A function of ours or of a library that is running at a moment of a training.
MOMENTS = {
    "loading the data": "gn_det.engine.run.check_config_data",
    "finding the weights": "gn_det.engine.run.check_weights_exist",
    "building": "detectron2.modeling.build_model",
    "a step": "gn_det.engine.step.AccumulatingTrainer._check_finite",
    "writing a checkpoint": "gn_det.checkpoint.checkpointer.torch.save",
    "an evaluation": "detectron2.evaluation.COCOEvaluator.process",
    "COCO's numbers": "pycocotools.cocoeval.COCOeval.evaluate",
}
WITH_CHECKPOINT = ("a step", "writing a checkpoint", "an evaluation", "COCO's numbers")


def run_held_up(path: str, arguments: list[str], where: str, folder: Path) -> None:
    """Run a program in a process of its own, which waits at its first call of a function."""
    os.setsid()
    multiprocessing.set_start_method("fork", force=True)  # as in a program that a user starts
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    if where:
        _hold_up(where, folder)
    sys.argv = [path, *arguments]
    os.chdir(ROOT)
    runpy.run_path(path, run_name="__main__")


def _hold_up(where: str, folder: Path) -> None:
    module, _, name = where.rpartition(".")
    try:
        owner: Any = import_module(module)
    except ImportError:
        outer, _, inner = module.rpartition(".")
        owner = getattr(import_module(outer), inner)
    function = getattr(owner, name)

    def held_up(*args: Any, **kwargs: Any) -> Any:
        (folder / "there").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        return function(*args, **kwargs)

    setattr(owner, name, held_up)


Begin = Callable[..., multiprocessing.Process]


@pytest.fixture(scope="module")
def preloaded() -> Any:
    """A context whose processes have imported what takes seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["gn_det.engine.trainer", "gn_det.engine.run", "gn_det.plots.curves", "support.programs"]
    )
    return context


@pytest.fixture
def begin(preloaded: Any, tmp_path: Path) -> Iterator[Begin]:
    """Begin a program; what is left of it at the end is killed."""
    begun = []

    def begin(path: str, *arguments: object, where: str = "") -> multiprocessing.Process:
        process = preloaded.Process(
            target=run_held_up, args=(path, [*map(str, arguments)], where, tmp_path)
        )
        process.start()
        begun.append(process)
        return process

    yield begin
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, KILL)
        process.join()


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def group_of(process: multiprocessing.Process) -> list[str]:
    found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
    return found.stdout.split()


def training(shapes: Path, output: Path, **settings: object) -> list[object]:
    chosen = {
        "OUTPUT_DIR": output, "MODEL.DEVICE": "cpu", "SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2, "DATALOADER.NUM_WORKERS": 1, "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64, **settings,
    }  # fmt: skip
    config = ["--config-file", ROOT / "configs/small/quickstart.yaml"]
    return [*config, *folder_flags(shapes), *(part for item in chosen.items() for part in item)]


@pytest.mark.slow
@pytest.mark.parametrize("to", ["the process", "its group"])
@pytest.mark.parametrize("number", [INT, TERM, HUP], ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_training_ends_in_good_order(
    moment: str, number: signal.Signals, to: str, begin: Begin, shapes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    arguments = training(shapes, output)
    process = begin("tools/train_net.py", *arguments, where=MOMENTS[moment])
    wait_for((tmp_path / "there").exists)
    (os.kill if to == "the process" else os.killpg)(process.pid, number)
    time.sleep(0.1)
    (tmp_path / "go").touch()
    process.join(SECONDS)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == STATUS[number], said
    assert "Traceback" not in said and "Exception" not in said
    assert (output / "last_checkpoint").exists() == (moment in WITH_CHECKPOINT)
    wait_for(lambda: not group_of(process), 10)
