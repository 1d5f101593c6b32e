"""Group Normalization with fused kernels, for detectors that train at 1-2 images per GPU.

Four verbs change or describe a model that you have built, in place::

    import gn_det

    gn_det.inject(model, "ALL")  # replace BN by FusedGroupNorm, and add it where there was no norm
    gn_det.fuse(model)  # compute norm, addition and ReLU in one call
    gn_det.recompute(model)  # optional: train in about the activation memory of frozen BN
    print(gn_det.audit(model))  # list every norm, and what was left alone

Functions for models: inject, fuse, recompute, unfuse (also called revert), audit, convert_bn
(with DetectorBatch and run_on_boxes for Detectron2's detectors), distill.
For Detectron2 configs: add_gn_config, get_config.
Building blocks: FusedGroupNorm (the layer), group_norm (the function), default_num_groups.
What they refer to: SITES (the places that inject knows), InputError (the error for bad input).

Names are imported on first use, so that neither Detectron2 nor Triton has to be installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gn_det.version import __version__

if TYPE_CHECKING:
    from gn_det.config import add_gn_config, get_config
    from gn_det.errors import InputError
    from gn_det.injection import (
        SITES,
        DetectorBatch,
        audit,
        convert_bn,
        distill,
        fuse,
        inject,
        recompute,
        revert,
        run_on_boxes,
        unfuse,
    )
    from gn_det.layers import FusedGroupNorm, default_num_groups
    from gn_det.ops import group_norm

__all__ = [
    "SITES",
    "DetectorBatch",
    "FusedGroupNorm",
    "InputError",
    "__version__",
    "add_gn_config",
    "audit",
    "convert_bn",
    "default_num_groups",
    "distill",
    "fuse",
    "get_config",
    "group_norm",
    "inject",
    "recompute",
    "revert",
    "run_on_boxes",
    "unfuse",
]

_HOME = {
    "DetectorBatch": "gn_det.injection",
    "FusedGroupNorm": "gn_det.layers",
    "InputError": "gn_det.errors",
    "SITES": "gn_det.injection",
    "add_gn_config": "gn_det.config",
    "audit": "gn_det.injection",
    "convert_bn": "gn_det.injection",
    "default_num_groups": "gn_det.layers",
    "distill": "gn_det.injection",
    "fuse": "gn_det.injection",
    "get_config": "gn_det.config",
    "group_norm": "gn_det.ops",
    "inject": "gn_det.injection",
    "recompute": "gn_det.injection",
    "revert": "gn_det.injection",
    "run_on_boxes": "gn_det.injection",
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
