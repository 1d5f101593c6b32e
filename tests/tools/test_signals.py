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
from support.programs import ROOT, folder_flags, preloaded_context

INT, TERM, HUP, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL
STATUS = {INT: 130, TERM: 143, HUP: 143}
SECONDS = 60  # a bound on hanging
LONG = 60  # steps, which take longer than a test; each second one writes a checkpoint of 100 MB

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
    # As from a terminal; what starts the tests may ignore them, as nohup does.
    signal.signal(INT, signal.default_int_handler)
    signal.signal(HUP, signal.SIG_DFL)
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


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Begin]:
    """Begin a program; what is left of it at the end is killed."""
    begun = []

    def begin(path: str, *arguments: object, where: str = "") -> multiprocessing.Process:
        process = preloaded_context().Process(
            target=run_held_up, args=(path, [*map(str, arguments)], where, tmp_path)
        )
        process.start()
        begun.append(process)
        wait_for((tmp_path / "said.txt").exists)
        return process

    yield begin
    for process in begun:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, KILL)
        process.kill()
        process.join()


def wait_for(condition: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def group_of(process: multiprocessing.Process) -> list[str]:
    """The processes of a group that run; one that has ended may wait for somebody to notice."""
    found = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True)
    return [pid for pid in found.stdout.split() if runs(pid)]


def runs(pid: str) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def training(shapes: Path, output: Path, **settings: object) -> list[object]:
    chosen = {
        "OUTPUT_DIR": output, "MODEL.DEVICE": "cpu", "SOLVER.MAX_ITER": 4, "TEST.EVAL_PERIOD": 2,
        "SOLVER.CHECKPOINT_PERIOD": 2, "DATALOADER.NUM_WORKERS": 1, "INPUT.MIN_SIZE_TRAIN": "(64,)",
        "INPUT.MIN_SIZE_TEST": 64, **settings,
    }  # fmt: skip
    config = ["--config-file", ROOT / "configs/small/quickstart.yaml"]
    return [*config, *folder_flags(shapes), *(part for item in chosen.items() for part in item)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to"),
    [(INT, "its group"), (TERM, "the process"), (TERM, "its group"), (HUP, "the process")],
    ids=str,
)
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [INT, TERM, HUP], ids=lambda number: number.name)
def test_an_evaluation_alone_ends_at_once(
    number: signal.Signals, begin: Begin, shapes: Path, tmp_path: Path
) -> None:
    weights = tmp_path / "run"
    begin("tools/train_net.py", *training(shapes, weights, **{"SOLVER.MAX_ITER": 1})).join(SECONDS)
    resumed = ["--eval-only", "--resume", *training(shapes, weights)]
    process = begin("tools/train_net.py", *resumed, where=MOMENTS["an evaluation"])
    wait_for((tmp_path / "there").exists)
    os.killpg(process.pid, number)
    process.join(SECONDS)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == STATUS[number] and "Traceback" not in said
    assert said.splitlines()[-1] == ("interrupted" if number == INT else "terminated")
    wait_for(lambda: not group_of(process), 10)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(begin: Begin, shapes: Path, tmp_path: Path) -> None:
    arguments = training(shapes, tmp_path / "run")
    process = begin("tools/train_net.py", *arguments, where=MOMENTS["a step"])
    wait_for((tmp_path / "there").exists)
    os.kill(process.pid, TERM)
    process.join(0.5)
    assert process.is_alive()
    os.kill(process.pid, TERM)
    process.join(SECONDS)
    assert process.exitcode == -TERM
    wait_for(lambda: not group_of(process), 10)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["a step", "an evaluation"])
def test_a_killed_loading_process_is_one_line(
    moment: str, begin: Begin, shapes: Path, tmp_path: Path
) -> None:
    arguments = training(shapes, tmp_path / "run")
    process = begin("tools/train_net.py", *arguments, where=MOMENTS[moment])
    wait_for((tmp_path / "there").exists)
    for worker in group_of(process):
        if worker != str(process.pid):
            os.kill(int(worker), KILL)
    (tmp_path / "go").touch()
    process.join(SECONDS)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith("error: a loading process ended")


# What the program does, when it has come far enough, the signal, and to whom.
TWO = [
    ("starting", INT, os.kill),
    ("starting", KILL, os.kill),
    ("training", INT, os.kill),
    ("training", TERM, os.killpg),
    ("training", KILL, os.kill),
    ("evaluating", TERM, os.killpg),
]


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "number", "send"), TWO)
def test_two_processes_end_with_the_one_that_started_them(
    moment: str, number: signal.Signals, send: Callable, begin: Begin, shapes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    long = {"SOLVER.MAX_ITER": LONG, "TEST.EVAL_PERIOD": 4 if moment == "evaluating" else 0}
    arguments = ["--num-gpus", 2, *training(shapes, output, **long)]
    process = begin("tools/train_net.py", *arguments)
    said = tmp_path / "said.txt"
    if moment == "starting":
        wait_for(lambda: len(group_of(process)) > 2)
    elif moment == "training":
        wait_for((output / "model_0000001.pth").exists)
    else:
        wait_for(lambda: "Start inference" in said.read_text())
    send(process.pid, number)
    process.join(SECONDS)
    assert process.exitcode == STATUS.get(number, -number), said.read_text()
    # One that still imports its modules ends when it has done so.
    wait_for(lambda: not group_of(process), SECONDS if moment == "starting" else 10)
    traces = said.read_text().split("Traceback")[1:]
    # Where one is killed, multiprocessing's thread that hands batches over may find it gone, and a
    # process that it was starting may find half of what it had to be told.
    theirs = ("resource_sharer.py", "EOFError: Ran out of input")
    of_killed = [trace for trace in traces if number == KILL and any(t in trace for t in theirs)]
    assert of_killed == traces
    assert bool([*output.glob("model_*.pth")]) == (moment != "starting")


@pytest.mark.slow
@pytest.mark.parametrize("number", [INT, TERM, KILL], ids=lambda number: number.name)
@pytest.mark.parametrize("program", ["compare", "batch_size_sweep"])
def test_a_study_takes_its_runs_along(
    program: str, number: signal.Signals, begin: Begin, shapes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "study"
    if program == "compare":
        recipe = ROOT / "configs/small/quickstart.yaml"
        settings = training(shapes, tmp_path / "unused", **{"SOLVER.MAX_ITER": LONG})[2:]
        flags = ["--recipes", recipe, "--seeds", 0, "--ims-per-gpu", 2, *settings]
    else:
        flags = ["--norms", "GN", "--ims-per-gpu", 128, "--seeds", 0, "--data", "digits"]
        flags += ["--network", "resnet10", "--epochs", 1000]
    process = begin(f"tools/{program}.py", "--output", output, *flags)
    wait_for(lambda: bool([*output.glob("runs/*/model_*.pth")]))
    started = processes_below(process)
    assert started
    os.kill(process.pid, number)
    process.join(SECONDS)
    said = (tmp_path / "said.txt").read_text()
    assert process.exitcode == STATUS.get(number, -number) and "Traceback" not in said, said
    wait_for(lambda: not any(map(runs, started)), 10)
    assert [*output.glob("runs/*/last_checkpoint")]


def processes_below(process: multiprocessing.Process) -> list[str]:
    """Children of a process that are no helpers of Python's."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [
        pid
        for pid in found.stdout.split()
        if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def test_too_few_open_files_are_said_as_they_are() -> None:
    command = f"ulimit -n 16; {sys.executable} {ROOT}/tools/train_net.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: this process may have 16 files open, and needs")
