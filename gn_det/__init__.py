"""Group Normalization for detectors and segmenters trained at one or two images per GPU.

Every public name resolves on first use, so that ``import gn_det`` costs nothing and works where
neither Detectron2 nor Triton is installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gn_det.version import __version__

if TYPE_CHECKING:
    from gn_det.config import add_gn_config, get_config
    from gn_det.errors import InputError
    from gn_det.injection import audit, convert_bn, fuse, inject, recompute, revert, unfuse
    from gn_det.layers import FusedGroupNorm, default_num_groups
    from gn_det.ops import group_norm

__all__ = [
    "FusedGroupNorm",
    "InputError",
    "__version__",
    "add_gn_config",
    "audit",
    "convert_bn",
    "default_num_groups",
    "fuse",
    "get_config",
    "group_norm",
    "inject",
    "recompute",
    "revert",
    "unfuse",
]

_HOME = {
    "FusedGroupNorm": "gn_det.layers",
    "InputError": "gn_det.errors",
    "add_gn_config": "gn_det.config",
    "audit": "gn_det.injection",
    "convert_bn": "gn_det.injection",
    "default_num_groups": "gn_det.layers",
    "fuse": "gn_det.injection",
    "get_config": "gn_det.config",
    "group_norm": "gn_det.ops",
    "inject": "gn_det.injection",
    "recompute": "gn_det.injection",
    "revert": "gn_det.injection",
    "unfuse": "gn_det.injection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
