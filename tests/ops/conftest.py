"""What tests of the operator share."""

from __future__ import annotations

import pytest

from gn_det.ops import backend, guarded


@pytest.fixture
def as_on_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No choice in the environment, nothing warned of, and no device checked yet."""
    monkeypatch.delenv("GN_DET_BACKEND", raising=False)
    monkeypatch.delenv("GN_DET_SELF_CHECK", raising=False)
    monkeypatch.setattr(backend, "_warned", set())
    monkeypatch.setattr(guarded, "_verdicts", {})
