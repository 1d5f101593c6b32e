"""The self-check of a device, on the kernels themselves."""

from __future__ import annotations

import pytest
import torch
from support.kernels import DTYPES

from gn_det.ops.kernels import launch
from gn_det.ops.self_check import find_mismatch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_pass_it(dtype: torch.dtype, device: torch.device) -> None:
    assert find_mismatch(device, dtype) is None


@pytest.mark.usefixtures("nan_in_new_memory")  # else right values of another test may be there
@pytest.mark.parametrize(
    "kernel",
    [
        launch.one_pass_kernel,
        launch.one_pass_gradients_kernel,
        launch.statistics_kernel,
        launch.apply_kernel,
        launch.gradient_sums_kernel,
        launch.reduce_gradients_kernel,
        launch.apply_gradients_kernel,
    ],
    ids=lambda kernel: kernel.__name__,
)
def test_it_runs_every_kernel_and_notices_one_that_does_nothing(
    kernel: object, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = launch.run

    def all_but_one(launches: list, device: torch.device) -> None:
        run([one for one in launches if one.kernel is not kernel], device)

    monkeypatch.setattr(launch, "run", all_but_one)
    assert "where the reference has" in find_mismatch(device, torch.float32)
