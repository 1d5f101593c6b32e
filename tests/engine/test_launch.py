"""What cannot be launched is refused before anything is."""

from __future__ import annotations

import os
import signal
from argparse import Namespace

import pytest
import torch

from gn_det import InputError
from gn_det.engine.launch import check_processes, launch


def check(
    device: str,
    num_gpus: int,
    ims_per_batch: int,
    *,
    num_machines: int = 1,
    amp: bool = False,
    eval_only: bool = False,
) -> None:
    args = Namespace(num_gpus=num_gpus, num_machines=num_machines, eval_only=eval_only)
    check_processes(device, args, ims_per_batch, amp=amp)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


def test_the_cpu_takes_any_number_of_processes() -> None:
    check("cpu", 2, 4)


def test_a_gpu_that_is_not_there_is_refused(no_gpu: None) -> None:
    with pytest.raises(InputError, match=r"cuda .* sees 0 GPUs; or use the CPU: MODEL\.DEVICE cpu"):
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
    check("cuda", 2, 8, num_machines=4)
    with pytest.raises(InputError, match="4 images .* 8 processes"):
        check("cuda", 2, 4, num_machines=4)


def test_a_numbered_gpu_serves_one_process(two_gpus: None) -> None:
    with pytest.raises(InputError, match="cuda:0 cannot serve 2 processes; say cuda"):
        check("cuda:0", 2, 2)


def test_evaluation_asks_for_no_training_settings() -> None:
    check("cpu", 4, 2, amp=True, eval_only=True)


def fail(message: str) -> None:
    raise InputError(message)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 2])
def test_bad_input_found_in_any_process_comes_back_as_it_was(processes: int) -> None:
    args = Namespace(num_gpus=processes, num_machines=1, machine_rank=0, dist_url="auto")
    with pytest.raises(InputError, match="^weights: 3 missing$"):
        launch(fail, "cpu", args, "weights: 3 missing")


def test_a_killed_process_is_told() -> None:
    args = Namespace(num_gpus=2, num_machines=1, machine_rank=0, dist_url="auto")
    with pytest.raises(InputError, match="ended with SIGKILL; .* memory"):
        launch(die, "cpu", args)


def test_mixed_precision_on_the_cpu_is_refused(two_gpus: None) -> None:
    check("cuda", 1, 1, amp=True)
    with pytest.raises(InputError, match=r"SOLVER\.AMP\.ENABLED False"):
        check("cpu", 1, 1, amp=True)


@pytest.mark.parametrize(("device", "processes"), [("gpu", 1), ("cpu", 0)])
def test_nonsense_is_refused(device: str, processes: int) -> None:
    with pytest.raises(InputError, match="gpu|at least 1"):
        check(device, processes, 1)
