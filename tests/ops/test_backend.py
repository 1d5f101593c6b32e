"""Which implementation is taken, what is said about it, and when it is refused."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from support.programs import ROOT

from gn_det.errors import InputError
from gn_det.ops import backend, group_norm


@pytest.fixture(autouse=True)
def as_on_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing chosen, nothing warned of yet, and a Triton that will do."""
    monkeypatch.delenv("GN_DET_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(backend, "TRITON_VERSION", "3.2.0")


@pytest.mark.parametrize(
    ("choice", "device_type", "kernels"),
    [
        (None, "cuda", True),
        (None, "cpu", False),
        (None, "meta", False),
        ("auto", "cuda", True),
        ("auto", "cpu", False),
        ("aten", "cuda", False),
        ("aten", "cpu", False),
        ("aten", "mps", False),
        ("triton", "cuda", True),
    ],
)
def test_the_kernels_run_where_they_can_unless_told_otherwise_and_nothing_is_said(
    choice: str | None, device_type: str, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice is not None:
        monkeypatch.setenv("GN_DET_BACKEND", choice)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.kernels_run_on(device_type) is kernels


@pytest.mark.parametrize("interpret", [None, "0", ""])
def test_triton_on_the_cpu_is_refused_with_the_reason(
    interpret: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    if interpret is not None:
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
    with pytest.raises(InputError, match="=triton, but .* on the CPU.* TRITON_INTERPRET=1; choose"):
        backend.kernels_run_on("cpu")


def test_triton_runs_on_the_cpu_in_its_interpreter_but_not_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not backend.kernels_run_on("cpu")
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    assert backend.kernels_run_on("cpu")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("choice", ["Triton", "cuda"])
def test_an_unknown_choice_is_refused_with_the_known_ones(
    choice: str, device_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", choice)
    with pytest.raises(InputError, match=f"^GN_DET_BACKEND={choice}: choose auto, triton or aten$"):
        backend.kernels_run_on(device_type)


def test_the_choice_is_read_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 8, 2, 2)
    assert group_norm(x, 4).shape == x.shape
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    with pytest.raises(InputError, match="the tensor is on the CPU"):
        group_norm(x, 4)
    monkeypatch.setenv("GN_DET_BACKEND", "fast")
    with pytest.raises(InputError, match="GN_DET_BACKEND=fast"):
        group_norm(x, 4)


@pytest.mark.parametrize(
    ("device_type", "triton_version", "reason"),
    [
        ("cuda", None, "Triton is not installed"),
        ("cuda", "3.1.0", "Triton is 3.1.0, older than 3.2"),
        ("cuda", "2.3.1+git", "Triton is 2.3.1+git, older than 3.2"),
        ("mps", "3.2.0", "the kernels are for CUDA and ROCm, not for mps"),
        ("xpu", "3.2.0", "the kernels are for CUDA and ROCm, not for xpu"),
    ],
)
def test_an_obstacle_on_a_gpu_is_warned_of_once_and_is_an_error_for_triton(
    device_type: str,
    triton_version: str | None,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "TRITON_VERSION", triton_version)
    with pytest.warns(UserWarning) as said:
        assert not any(backend.kernels_run_on(device_type) for _ in range(5))
    assert [str(warning.message) for warning in said] == [
        f"group_norm on {device_type} runs without its fused kernel: {reason}"
    ]
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    with pytest.raises(InputError) as refusal:
        backend.kernels_run_on(device_type)
    assert str(refusal.value) == f"GN_DET_BACKEND=triton, but {reason}; choose auto or aten"


@pytest.mark.parametrize("version", ["3.2.0", "3.10.1", "4.0", "3.6.0+git1234"])
def test_newer_tritons_will_do(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    monkeypatch.setattr(backend, "TRITON_VERSION", version)
    assert backend.kernels_run_on("cuda")


@pytest.mark.parametrize("version", ["2.5.1", "2.5.1+cu124", "1.13.1", "2.0"])
def test_a_pytorch_too_old_is_refused_with_both_versions(version: str) -> None:
    with pytest.raises(ImportError) as refusal:
        backend.check_torch(version)
    assert str(refusal.value) == f"gn_det needs PyTorch 2.6 or newer, this is {version}"


@pytest.mark.parametrize("version", ["2.6.0", "2.10.0", "2.14.1+cu130", "2.7.0a0+git123", "3.0"])
def test_newer_pytorchs_will_do(version: str) -> None:
    backend.check_torch(version)


def test_where_triton_cannot_be_imported_the_function_works_on_aten() -> None:
    program = """
import sys

sys.modules["triton"] = None  # makes importing it an ImportError
import torch
from gn_det.ops import group_norm
from gn_det.ops.backend import kernels_run_on

print(group_norm(torch.zeros(1, 8, 2, 2), 4).shape, kernels_run_on("cuda"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "torch.Size([1, 8, 2, 2]) False\n", done.stderr
    assert "without its fused kernel: Triton is not installed" in done.stderr
