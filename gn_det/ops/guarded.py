"""Run the kernels, and ATen's operators where the kernels do not run or give wrong results.

The first call in a dtype on a device holds the kernels to the reference; a later one may still find
that a kernel does not compile, or does not fit on the card. Either way training goes on.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gn_det.errors import InputError
from gn_det.ops import aten
from gn_det.ops.backend import insists_on_kernels, warn_once
from gn_det.ops.form import Form
from gn_det.ops.obstacles import obstacle_of
from gn_det.ops.self_check import find_mismatch

__all__ = ["backward", "forward", "give_up", "kernels_work"]

# By device and dtype: None where the kernels work, else why they do not.
_verdicts: dict[tuple[torch.device, torch.dtype], str | None] = {}
_checking = threading.Lock()


def forward(inputs: Any, num_groups: int, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """y and the statistics of a gn_det.ops.kernels.launch.Inputs, computed.

    Raises:
        InputError: the kernels cannot run and GN_DET_BACKEND=triton insists on them.
    """
    from gn_det.ops.kernels import launch

    x = inputs.x
    if kernels_work(x.device, x.dtype):
        y, statistics, launches = launch.forward_launches(inputs, num_groups, eps, form)
        if _ran(launches, x):
            return y, statistics
    return aten.forward(inputs, num_groups, eps, form)


def backward(
    inputs: Any, y: Tensor | None, statistics: Tensor, dy: Tensor, num_groups: int, form: Form
) -> tuple[Tensor, Tensor | None, Tensor]:
    """dx, the residual's gradient, dγ and dβ of gn_det.ops.kernels.launch.backward_launches.

    Raises:
        InputError: see :func:`forward`.
    """
    from gn_det.ops.kernels import launch

    x = inputs.x
    if kernels_work(x.device, x.dtype):
        dx, dresidual, dparameters, launches = launch.backward_launches(
            inputs, y, statistics, dy, num_groups, form
        )
        if _ran(launches, x):
            return dx, dresidual, dparameters
    return aten.backward(inputs, y, statistics, dy, num_groups, form)


def kernels_work(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels may be launched, found out by a self-check at the first call.

    GN_DET_SELF_CHECK=0 trusts them unchecked, and so does Triton's interpreter on the CPU. While a
    CUDA graph is captured, which nothing may wait in, the check is put off.

    Args:
        device: with its index, as that of a tensor.
        dtype: of the input.

    Raises:
        InputError: GN_DET_SELF_CHECK is neither 0 nor 1; or they do not work, and
            GN_DET_BACKEND=triton insists on them.
    """
    key = (device, dtype)
    if key not in _verdicts:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return True
        with _checking:
            if key not in _verdicts:
                _verdicts[key] = _find_fault(device, dtype)
    if _verdicts[key] is None:
        return True
    _tell(device, dtype)
    return False


def _find_fault(device: torch.device, dtype: torch.dtype) -> str | None:
    choice = os.environ.get("GN_DET_SELF_CHECK", "1")
    if choice not in ("0", "1"):
        raise InputError(f"GN_DET_SELF_CHECK={choice}: choose 0 or 1")
    if choice == "0" or device.type == "cpu":
        return None
    try:
        mismatch = find_mismatch(device, dtype)
    except Exception as error:
        obstacle = obstacle_of(error)
        if obstacle is None:
            raise
        return obstacle
    return mismatch and f"they compute something else: {mismatch}; please report this with the card"


def _ran(launches: Iterable[Any], x: Tensor) -> bool:
    """Run launches on the device of x; False where they could not be, from then on."""
    from gn_det.ops.kernels import launch

    try:
        launch.run(launches, x.device)
    except Exception as error:
        give_up(x, error)
        return False
    return True


def give_up(x: Tensor, error: Exception) -> None:
    """Have ATen compute from now on in the place of kernels whose launch ended in an error.

    Args:
        x: the input that they were launched for.
        error: raised again where it is none of the kernels'.
    """
    obstacle = obstacle_of(error)
    if obstacle is None:
        raise error
    _verdicts[x.device, x.dtype] = obstacle
    _tell(x.device, x.dtype, error)


def _tell(device: torch.device, dtype: torch.dtype, error: Exception | None = None) -> None:
    """Warn once that the kernels do not work, or raise where they are insisted on."""
    place = f"on {device} in {str(dtype).removeprefix('torch.')}"
    fault = _verdicts[device, dtype]
    if insists_on_kernels():
        raise InputError(
            f"GN_DET_BACKEND=triton, but the kernels do not work {place}: {fault}; mend that, or "
            "choose auto or aten"
        ) from error
    warn_once(f"group_norm {place} runs on ATen's operators, not on its fused kernels: {fault}")


def _forget_lock() -> None:
    """In a forked process: the thread that held the lock is not there."""
    global _checking
    _checking = threading.Lock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_lock)
