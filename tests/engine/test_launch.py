"""What cannot be launched is refused before anything is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from detectron2.utils import comm
from support.programs import ROOT

from gn_det import InputError
from gn_det.data.pictures import PictureError
from gn_det.engine.command import RunOptions
from gn_det.engine.launch import check_processes, launch, torchrun_rank, with_torchrun
from gn_det.engine.termination import TERMINATED


def check(
    device: str,
    num_gpus: int,
    ims_per_batch: int,
    *,
    num_machines: int = 1,
    amp: bool = False,
    eval_only: bool = False,
    dist_url: str = "auto",
) -> None:
    options = RunOptions(
        num_gpus=num_gpus, num_machines=num_machines, eval_only=eval_only, dist_url=dist_url
    )
    check_processes(device, options, ims_per_batch, amp=amp)


def test_a_numbered_gpu_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and memory are read on the current GPU."""
    calls = []
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    options = RunOptions()
    launch(calls.append, "cuda:1", options, "main")
    assert calls == [torch.device("cuda:1"), "main"]


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_the_cpu_takes_any_number_of_processes() -> None:
    check("cpu", 2, 4)


def test_a_gpu_that_is_not_there_is_refused(no_gpu: None) -> None:
    with pytest.raises(
        InputError, match=r"cuda .* sees 0 GPUs; to use the CPU, set MODEL\.DEVICE cpu"
    ):
        check("cuda", 1, 2)


def test_more_processes_than_gpus_are_refused(two_gpus: None) -> None:
    check("cuda", 2, 2)
    with pytest.raises(InputError, match="--num-gpus 4, and PyTorch sees 2"):
        check("cuda", 4, 4)


def test_a_numbered_gpu_must_exist(two_gpus: None) -> None:
    check("cuda:1", 1, 2)
    with pytest.raises(InputError, match="cuda:2"):
        check("cuda:2", 1, 2)


@pytest.mark.parametrize(("ims_per_batch", "processes"), [(3, 2), (1, 2), (0, 1)])
def test_images_must_divide_among_the_processes(ims_per_batch: int, processes: int) -> None:
    with pytest.raises(InputError, match=rf"{ims_per_batch} images .* {processes} processes"):
        check("cpu", processes, ims_per_batch)


def test_machines_count(two_gpus: None) -> None:
    check("cuda", 2, 8, num_machines=4, dist_url="tcp://a:1")
    with pytest.raises(InputError, match="4 images .* 8 processes"):
        check("cuda", 2, 4, num_machines=4, dist_url="tcp://a:1")


def test_a_numbered_gpu_serves_one_process(two_gpus: None) -> None:
    with pytest.raises(InputError, match="cuda:0 cannot serve 2 processes; say cuda"):
        check("cuda:0", 2, 2)


def test_evaluation_asks_for_no_training_settings() -> None:
    check("cpu", 4, 2, amp=True, eval_only=True)


def fail(kind: type[Exception], message: str) -> None:
    raise kind(message)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", [InputError, PictureError])
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_bad_input_found_in_any_process_comes_back_as_it_was(
    processes: int, kind: type[Exception]
) -> None:
    options = RunOptions(num_gpus=processes)
    with pytest.raises(InputError, match="^weights: 3 missing$"):
        launch(fail, "cpu", options, kind, "weights: 3 missing")


def test_a_killed_process_is_told() -> None:
    options = RunOptions(num_gpus=2)
    with pytest.raises(InputError, match="ended with SIGKILL; .* memory"):
        launch(die, "cpu", options)


def test_mixed_precision_on_the_cpu_is_refused(two_gpus: None) -> None:
    check("cuda", 1, 1, amp=True)
    with pytest.raises(InputError, match=r"SOLVER\.AMP\.ENABLED False"):
        check("cpu", 1, 1, amp=True)


@pytest.mark.parametrize(("device", "processes"), [("gpu", 1), ("cpu", 0)])
def test_nonsense_is_refused(device: str, processes: int) -> None:
    with pytest.raises(InputError, match="gpu|at least 1"):
        check(device, processes, 1)


def wait_for_sigterm(folder: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    (folder / f"waiting{comm.get_rank()}").touch()
    time.sleep(60)


@pytest.mark.slow
def test_sigterm_goes_on_to_all_processes_and_their_status_comes_back(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nimport test_launch as t\n"
        "options = t.RunOptions(num_gpus=2)\n"
        "if __name__ == '__main__':\n"
        f"    t.launch(t.wait_for_sigterm, 'cpu', options, Path({str(tmp_path)!r}))\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests/engine:{ROOT}/tests"}
    process = subprocess.Popen([sys.executable, program], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("waiting*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 143


def test_torchruns_numbers_are_taken_where_it_started_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = RunOptions()
    assert torchrun_rank() is None and with_torchrun(options) == options
    names = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    assert torchrun_rank() == 5
    assert with_torchrun(options) == RunOptions(num_gpus=4, num_machines=2)


def test_the_cpu_under_torchrun_needs_hidden_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    options = RunOptions(num_gpus=2)
    with pytest.raises(InputError, match="hide them with CUDA_VISIBLE_DEVICES="):
        launch(fail, "cpu", options, "unseen")


def test_several_machines_need_a_place_to_meet() -> None:
    with pytest.raises(InputError, match="--num-machines 2: name the place where they meet"):
        check("cpu", 1, 2, num_machines=2)


def test_processes_of_two_runs_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comm, "all_gather", lambda token: [token, "another"])
    with pytest.raises(InputError, match="processes of two runs have met at one address"):
        launch(fail, "cpu", RunOptions(), "unseen")
