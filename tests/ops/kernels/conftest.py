"""The kernel lane: on a GPU, or with TRITON_INTERPRET=1 on the CPU; see the Makefile."""

from __future__ import annotations

import pytest
import torch
from support.kernels import INTERPRETED

if not INTERPRETED and not torch.cuda.is_available():
    # Triton reads TRITON_INTERPRET when it is imported: these tests need a process of their own.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
