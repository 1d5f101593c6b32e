"""Putting FusedGroupNorm into models that others wrote, fusing, and showing what is where."""

from gn_det.injection.audit import audit
from gn_det.injection.convert_bn import convert_bn
from gn_det.injection.fuse import fuse, recompute, revert
from gn_det.injection.inject import inject

__all__ = ["audit", "convert_bn", "fuse", "inject", "recompute", "revert"]
