"""Functions that change built models in place, and what they report."""

from gn_det.injection.audit import audit
from gn_det.injection.boxes import DetectorBatch, run_on_boxes
from gn_det.injection.convert_bn import convert_bn
from gn_det.injection.distill import distill
from gn_det.injection.fuse import fuse, revert, unfuse
from gn_det.injection.inject import inject
from gn_det.injection.recompute import recompute
from gn_det.injection.sites import SITES

__all__ = [
    "SITES",
    "DetectorBatch",
    "audit",
    "convert_bn",
    "distill",
    "fuse",
    "inject",
    "recompute",
    "revert",
    "run_on_boxes",
    "unfuse",
]
