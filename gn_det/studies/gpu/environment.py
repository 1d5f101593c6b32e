"""What the figures were measured with: versions, the card, the commit."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from gn_det.ops.backend import TRITON_VERSION
from gn_det.version import commit

__all__ = ["environment"]

_PACKAGES = ("torchvision", "detectron2", "sal-detectron2", "apex", "liger-kernel", "torchnorm")


def environment(device: torch.device) -> dict[str, Any]:
    """Facts by name; what is not there is left out."""
    facts: dict[str, Any] = {
        "commit": commit(),
        "Python": platform.python_version(),
        "system": platform.platform(),
        "PyTorch": torch.__version__,
        "Triton": TRITON_VERSION,
        "CUDA": torch.version.cuda,
        "ROCm": torch.version.hip,
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        facts |= {
            "card": card.name,
            "compute capability": f"{card.major}.{card.minor}",
            "memory GiB": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
        }
    return {name: fact for name, fact in facts.items() if fact is not None}
