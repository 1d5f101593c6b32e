"""Putting FusedGroupNorm into models that others wrote, fusing, and showing what is where."""

from gn_det.injection.audit import audit
from gn_det.injection.convert_bn import convert_bn
from gn_det.injection.fuse import fuse, revert, unfuse
from gn_det.injection.inject import inject
from gn_det.injection.recompute import recompute

__all__ = ["audit", "convert_bn", "fuse", "inject", "recompute", "revert", "unfuse"]
