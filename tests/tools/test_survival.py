"""Training runs that are killed, ended, or run into NaN, and what is left of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support.programs import ROOT, folder_flags

from gn_det import InputError

TRAIN_NET = "tools/train_net.py"
CONFIG = ["--config-file", ROOT / "configs/small/quickstart.yaml"]
STEPS = 12
# No evaluation, a checkpoint every four steps, two loading processes.
SETTINGS = [
    "SOLVER.MAX_ITER", STEPS, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.EVAL_PERIOD", 0,
    "SOLVER.WARMUP_ITERS", 2, "DATALOADER.NUM_WORKERS", 2, "SOLVER.ACCUMULATE_STEPS", 2,
]  # fmt: skip

Start = Callable[..., subprocess.Popen]

pytestmark = pytest.mark.slow  # each trains, in processes of its own


@pytest.fixture
def start(shapes: Path) -> Iterator[Start]:
    """Start a run in its own session; what is left of it at the end is killed."""
    started = []

    def start(
        output: Path, *flags: object, launcher: tuple = (), settings: tuple = ()
    ) -> subprocess.Popen:
        train = folder_flags(shapes)[:3]
        command = [
            sys.executable, *launcher, ROOT / TRAIN_NET, *CONFIG, *train, *flags,
            "OUTPUT_DIR", output, *SETTINGS, *settings,
        ]  # fmt: skip
        with open(output.with_suffix(".txt"), "a") as said:
            process = subprocess.Popen(
                list(map(str, command)), stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="module")
def uninterrupted(
    shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Weights of the run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "run"
    command = [TRAIN_NET, *CONFIG, *folder_flags(shapes)[:3], "OUTPUT_DIR", output, *SETTINGS]
    subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, check=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    return final_weights(output)


def final_weights(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: int = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended before what was waited for"
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key, value in ours.items() if not torch.equal(value, theirs[key])]
    assert not different


def processes_of(output: Path) -> list[str]:
    found = subprocess.run(["pgrep", "-f", str(output)], capture_output=True, text=True)
    return found.stdout.split()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    start: Start, uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    # While the first checkpoint is written, and once more in the steps after one.
    for moment in ("model_0000003.pth.partial", "model_0000007.pth"):
        process = start(output, "--resume")
        wait_for(lambda name=moment: (output / name).exists(), process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while processes_of(output) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes_of(output)  # loading processes go with the one that was killed
    with open(output / "metrics.json", "a") as file:
        file.write('{"iteration": 7, "total_lo')  # what a kill may leave
    (output / "model_0000011.pth.partial").write_bytes(b"half")
    assert start(output, "--resume").wait() == 0
    assert_equal(final_weights(output), uninterrupted)
    lines = (output / "metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines][-1] == STEPS - 1
    assert not list(output.glob("*.partial"))


def test_sigterm_saves_the_step_and_its_status_says_so(
    start: Start, uninterrupted: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    output = tmp_path / "run"
    process = start(output)
    wait_for(lambda: (output / "model_0000003.pth").exists(), process)
    # As schedulers do it: to every process of the job, the loading ones, too.
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 143
    saved = (output / "last_checkpoint").read_text()
    assert int(re.fullmatch(r"model_(\d+)\.pth", saved).group(1)) >= 3
    assert start(output, "--resume").wait() == 0
    assert_equal(final_weights(output), uninterrupted)


@pytest.mark.parametrize("launcher", ["launch", "torchrun"])
def test_two_processes_survive_sigterm_and_go_on_alike(
    launcher: str, start: Start, tmp_path: Path
) -> None:
    flags = ["--num-gpus", 2, "--dist-url", "auto"] if launcher == "launch" else []
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run = {"launcher": torchrun if launcher == "torchrun" else ()}
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert start(whole, *flags, **run).wait() == 0
    process = start(output, *flags, **run)
    wait_for(lambda: (output / "model_0000003.pth").exists(), process)
    process.terminate()
    status = process.wait()
    assert status == 143 if launcher == "launch" else status != 0
    assert (output / "last_checkpoint").read_text() != "model_final.pth"
    assert start(output, "--resume", *flags, **run).wait() == 0
    assert_equal(final_weights(output), final_weights(whole))


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "run"
    options = [*SETTINGS, "DATALOADER.NUM_WORKERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1]
    wild = ["SOLVER.BASE_LR", 1e6, "SOLVER.WARMUP_ITERS", 0, "SOLVER.ACCUMULATE_STEPS", 1]
    message = (
        r"iteration \d: (the loss is not finite|Predicted .* Inf/NaN).*; images: \S+\.jpg, "
        r"\S+\.jpg; largest (gradients|weights): \S+ |not saved, as \d+ of \d+ tensors are not"
    )
    with pytest.raises(InputError, match=message):
        call_main(
            TRAIN_NET, *CONFIG, *folder_flags(shapes)[:3], "OUTPUT_DIR", output, *options, *wild
        )
    kept = torch.load(output / (output / "last_checkpoint").read_text(), weights_only=True)["model"]
    assert all(value.isfinite().all() for value in kept.values() if value.is_floating_point())


def test_a_disk_that_fills_up_ends_the_run_with_its_last_good_checkpoint(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "run"

    def fill_up() -> None:
        while not (output / "model_0000003.pth").exists():
            time.sleep(0.01)
        (output / "model_0000007.pth.partial").symlink_to("/dev/full")

    threading.Thread(target=fill_up, daemon=True).start()
    with pytest.raises(InputError, match=r"model_0000007\.pth cannot be written: No space left"):
        call_main(
            TRAIN_NET, *CONFIG, *folder_flags(shapes)[:3], "OUTPUT_DIR", output, *SETTINGS,
            "DATALOADER.NUM_WORKERS", 0,
        )  # fmt: skip
    assert (output / "last_checkpoint").read_text() == "model_0000003.pth"
    call_main(
        TRAIN_NET, *CONFIG, *folder_flags(shapes)[:3], "--resume", "OUTPUT_DIR", output,
        *SETTINGS, "DATALOADER.NUM_WORKERS", 0,
    )  # fmt: skip
    assert (output / "model_final.pth").exists()


def test_a_random_seed_is_kept_and_another_one_refused(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    flags = [*CONFIG, *folder_flags(shapes)[:3]]
    options = ["OUTPUT_DIR", tmp_path / "run", *SETTINGS, "DATALOADER.NUM_WORKERS", 0, "SEED", -1]
    call_main(TRAIN_NET, *flags, *options, "SOLVER.MAX_ITER", 1)
    seed = (tmp_path / "run" / "seed.txt").read_text()
    call_main(TRAIN_NET, *flags, "--resume", *options, "SOLVER.MAX_ITER", 2)
    assert (tmp_path / "run" / "seed.txt").read_text() == seed
    with pytest.raises(InputError, match=rf"began with the seed {seed.strip()} and cannot go on"):
        call_main(TRAIN_NET, *flags, "--resume", *options, "SEED", int(seed) + 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("period", [1, 0], ids=["on the way", "at the end"])
def test_a_signal_to_every_process_in_an_evaluation_leaves_a_checkpoint(
    period: int, number: signal.Signals, start: Start, shapes: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    val = ["--val", shapes / "val.json", shapes / "images"]
    process = start(output, *val, settings=("TEST.EVAL_PERIOD", period))
    said = output.with_suffix(".txt")
    wait_for(lambda: "Start inference" in said.read_text(), process)
    os.killpg(process.pid, number)
    assert process.wait(30) == 143
    assert "Traceback" not in said.read_text()
    assert (output / "last_checkpoint").exists()
    deadline = time.monotonic() + 10
    while processes_of(output) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not processes_of(output)
