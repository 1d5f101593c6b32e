"""A fixture for tests that ask which modules a model has, and not what it computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def without_memory() -> Iterator[None]:
    """Models are built on the meta device, which takes a tenth of the time."""
    with torch.device("meta"):
        yield
