"""test_traffic.py runs kernels, in the lane of tests/ops/kernels; a process of that lane cannot
compile ahead of time, which test_machine_code.py and test_host.py do.
"""

from __future__ import annotations

import pytest
import torch
from support.kernels import INTERPRETED

if INTERPRETED:
    collect_ignore = ["test_machine_code.py", "test_host.py"]
elif not torch.cuda.is_available():
    collect_ignore = ["test_traffic.py"]


@pytest.fixture(autouse=True)
def use_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.name == "test_traffic.py":
        monkeypatch.setenv("GN_DET_BACKEND", "triton")
