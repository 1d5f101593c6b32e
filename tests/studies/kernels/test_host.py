"""What a call costs the host: the stub takes the launches that a GPU would."""

from __future__ import annotations

import pytest
import torch

from gn_det.ops import group_norm
from gn_det.studies.kernels.host import PASSES, call_rows, kernels_on_stub


def test_the_stub_takes_every_launch() -> None:
    x = torch.randn(1, 64, 4, 4, requires_grad=True)
    with kernels_on_stub() as driver:
        y = group_norm(x, 32, activation="relu")
        forward = driver.utils.launches
        y.sum().backward()
    assert forward == 1 and driver.utils.launches > forward


def test_rows_hold_times_of_both_and_their_ratios() -> None:
    rows = call_rows(("GN+ReLU",), rounds=1)
    assert [row["pass"] for row in rows] == list(PASSES)
    for row in rows:
        for name in ("no launches", "to the driver"):
            assert row[f"{name} / ATen"] == pytest.approx(row[f"{name} µs"] / row["ATen µs"])
