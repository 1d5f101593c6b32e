"""tools/benchmark_group_norm.py, and what it counts without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.programs import run_program
from torch import nn

from gn_det import FusedGroupNorm, InputError
from gn_det.ops import group_norm
from gn_det.ops.form import FORMS
from gn_det.studies.kernels import report as kernel_report
from gn_det.studies.kernels import training_step
from gn_det.studies.kernels.peers import peer_rows
from gn_det.studies.kernels.report import DTYPES, Case, code_rows, timing_row


@pytest.mark.slow
def test_prints_peers_accuracy_and_memory_as_tables() -> None:
    done = run_program(
        "tools/benchmark_group_norm.py",
        "--ims-per-gpu",
        1,
        "--sections",
        "accuracy",
        "peers",
        "memory",
    )
    assert done.returncode == 0, done.stderr
    assert "## Accuracy" in done.stdout and "mean 1e4 σ" in done.stdout
    assert "## Peers" in done.stdout and "gn_det, GN+ReLU fused" in done.stdout
    recomputed = [line for line in done.stdout.splitlines() if "RECOMPUTE" in line]
    assert len(recomputed) == 2 and all(
        "100.0%" in line and "100.1%" in line for line in recomputed
    )
    assert ("No GPU: nothing was timed" in done.stdout) != torch.cuda.is_available()


def test_no_images_are_refused(call_main: Callable) -> None:
    with pytest.raises(InputError, match="--ims-per-gpu 0: at least 1"):
        call_main("tools/benchmark_group_norm.py", "--ims-per-gpu", 0)


def test_ours_reads_writes_and_keeps_the_least_of_the_peers() -> None:
    ours, *peers = peer_rows()
    assert (ours["forward"], ours["backward"]) == ("2R+1W, 6 B", "4R+1W, 10 B")
    assert float(ours["saved"]) == pytest.approx(2, abs=0.1)

    def number_of_bytes(row: dict[str, str], direction: str) -> int:
        return int(row[direction].split(", ")[1].removesuffix(" B"))

    for peer in peers:
        assert float(peer["saved"]) > float(ours["saved"])
        for direction in ("forward", "backward"):
            assert number_of_bytes(peer, direction) > number_of_bytes(ours, direction)


def test_kernels_that_several_sites_share_are_compiled_once() -> None:
    cases = [Case("one", (1, 64, 48, 48)), Case("other", (1, 64, 96, 48))]
    rows = code_rows(cases, "GN", "bf16", "contiguous")
    kernels = [row["kernel"] for row in rows]
    assert sorted(kernels) == sorted(set(kernels))
    assert {row["sites"] for row in rows} == {"one, other"}
    assert all(row["spills"] == row["atomics"] == 0 for row in rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_times_follow_a_check_of_every_result(
    form: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, standing in for a GPU: with a clock that says 2 ms for everything."""
    calls = []

    def milliseconds(function: Callable[[], object]) -> list[float]:
        calls.append(function())
        return [2.0]

    monkeypatch.setattr(kernel_report, "_milliseconds", milliseconds)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    case = Case("small", (1, 64, 4, 4))
    row = timing_row(case, form, dtype, "channels_last", device="cpu")
    # In turns: a copy, then forward and backward of ours, ATen's, under autocast, and compiled.
    assert len(calls) == kernel_report.ROUNDS * (1 + 2 * (3 if dtype == "fp32" else 4))
    assert row["ours forward ms"] == row["compiled ATen backward ms"] == 2.0
    # 4×4 pixels are one pass: GN and GN+ReLU read and write as much as a copy.
    assert row["forward of copy"] == ("100%" if form in ("GN", "GN+ReLU") else "150%")


@pytest.mark.slow
def test_passes_of_the_compiled_peer_can_be_timed_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def milliseconds(function: Callable[[], object]) -> list[float]:
        function()
        function()
        return [2.0]

    monkeypatch.setattr(kernel_report, "_milliseconds", milliseconds)
    row = timing_row(Case("small", (1, 64, 4, 4)), "GN+ReLU", "bf16", "contiguous", device="cpu")
    assert row["compiled ATen backward ms"] == 2.0


def test_a_wrong_result_on_the_device_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, standing in for a device: the check comes before any time is taken."""
    monkeypatch.setattr(kernel_report, "group_norm", lambda **a: 1.1 * group_norm(**a))
    with pytest.raises(ArithmeticError, match=r"small \(1, 64, 4, 4\): y is off by .* no time"):
        timing_row(Case("small", (1, 64, 4, 4)), "GN", "fp32", "contiguous", device="cpu")


def test_a_machine_that_slows_down_does_not_change_the_ratio_of_two_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slower = itertools.count(1)  # with each step

    def seconds(model: nn.Module, batch: list, seed: int) -> float:
        is_ours = any(isinstance(module, FusedGroupNorm) for module in model.modules())
        return next(slower) * (1.0 if is_ours else 2.0)

    monkeypatch.setattr(training_step, "_step", seconds)
    assert training_step.training_step_row(steps=5)["ratio"] == 0.5
