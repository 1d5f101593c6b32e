"""Which implementation computes: the Triton kernels, or ATen."""

from __future__ import annotations

import os
import warnings

import torch
from torch.autograd import forward_ad

from gn_det.errors import InputError

try:
    from gn_det.ops.kernels import TRITON_VERSION
except ImportError:
    TRITON_VERSION = None

__all__ = [
    "MIN_TORCH",
    "MIN_TRITON",
    "check_torch",
    "insists_on_kernels",
    "kernels_run_on",
    "under_transform",
    "warn_once",
]

MIN_TORCH = (2, 6)
MIN_TRITON = (3, 2)  # the one that PyTorch 2.6 brings

_GPUS = ("cuda", "mps", "xpu")
_warned: set[str] = set()


def kernels_run_on(device_type: str) -> bool:
    """Whether tensors on a device go to the Triton kernels.

    GN_DET_BACKEND decides: ``auto`` (default) takes the kernels on CUDA and ROCm where Triton is
    there, and ATen elsewhere, with one warning on a GPU; ``aten`` never takes them; ``triton``
    insists on them. With TRITON_INTERPRET=1, ``triton`` runs them on the CPU.

    Args:
        device_type: that of torch.device, "cuda" for CUDA and ROCm alike.

    Raises:
        InputError: GN_DET_BACKEND is none of the three, or ``triton`` cannot run on the device.
    """
    backend = os.environ.get("GN_DET_BACKEND", "auto")
    if backend == "auto" and device_type == "cpu":
        return False
    if backend not in ("auto", "triton", "aten"):
        raise InputError(f"GN_DET_BACKEND={backend}: choose auto, triton or aten")
    if backend == "aten":
        return False
    obstacle = _obstacle(device_type)
    if obstacle and backend == "triton":
        raise InputError(f"GN_DET_BACKEND=triton, but {obstacle}; choose auto or aten")
    if obstacle and device_type in _GPUS:
        warn_once(f"group_norm on {device_type} runs without its fused kernel: {obstacle}")
    return not obstacle


def _obstacle(device_type: str) -> str | None:
    """Why the kernels cannot run on a device, or None."""
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensor is on the CPU, where kernels only run with TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda"):
        return f"the kernels are for CUDA and ROCm, not for {device_type}"
    if TRITON_VERSION is None:
        return "Triton is not installed"
    if _numbers(TRITON_VERSION) < MIN_TRITON:
        return f"Triton is {TRITON_VERSION}, older than {_dotted(MIN_TRITON)}"
    return None


def insists_on_kernels() -> bool:
    """Whether GN_DET_BACKEND=triton makes an error of what is a warning otherwise."""
    return os.environ.get("GN_DET_BACKEND") == "triton"


def under_transform() -> bool:
    """Whether torch.func's transforms or forward-mode differentiation are at work.

    The kernels have no rules for these; ATen's operators do.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def warn_once(message: str) -> None:
    """Warn, once in a process for each message."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


def check_torch(version: str = torch.__version__) -> None:
    """Raise ImportError where PyTorch lacks what the custom operator needs."""
    if _numbers(version) < MIN_TORCH:
        raise ImportError(f"gn_det needs PyTorch {_dotted(MIN_TORCH)} or newer, this is {version}")


def _numbers(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as 2.14.1+cu130."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
