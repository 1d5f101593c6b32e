"""Putting FusedGroupNorm into models that others wrote, fusing, and showing what is where."""

from .calibration import convert_bn
from .convert import inject
from .fusion import fuse, recompute, revert
from .norm_audit import audit

__all__ = ["audit", "convert_bn", "fuse", "inject", "recompute", "revert"]
