"""The kernel lane: on a GPU, or with TRITON_INTERPRET=1 on the CPU; see the Makefile."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from support.kernels import INTERPRETED
from torch import Tensor

if not INTERPRETED and not torch.cuda.is_available():
    # Triton reads TRITON_INTERPRET when it is imported: these tests need a process of their own.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    # Its verdict stands for a process, and some tests replace what it runs.
    monkeypatch.setenv("GN_DET_SELF_CHECK", "0")


@pytest.fixture
def nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Let all memory start as NaN; the list gets the shapes of what was allocated."""
    shapes = []

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def wrapper(*args: object, **kwargs: object) -> Tensor:
            tensor = allocate(*args, **kwargs)
            shapes.append(tensor.shape)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, filled(getattr(owner, name)))
    return shapes
