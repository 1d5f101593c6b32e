"""Whole models for MODEL.META_ARCHITECTURE, with GN at MODEL.GN.SITES."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
    SemanticSegmentor,
)

from gn_det.modeling.with_gn import WithGN

__all__ = [
    "GNGeneralizedRCNN",
    "GNPanopticFPN",
    "GNProposalNetwork",
    "GNRetinaNet",
    "GNSemanticSegmentor",
]


class _AtSites(WithGN):
    """WithGN whose sites are an argument.

    Args:
        sites: see :func:`gn_det.inject`.
    """

    @configurable
    def __init__(self, *, sites: str | Sequence[str] = "default", **kwargs: Any) -> None:
        self.sites = sites
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        return {**super().from_config(cfg), "sites": cfg.MODEL.GN.SITES}


class GNGeneralizedRCNN(_AtSites, GeneralizedRCNN):
    """Faster, Mask, Keypoint and Cascade R-CNN with GN."""


class GNProposalNetwork(_AtSites, ProposalNetwork):
    """RPN alone with GN."""


class GNRetinaNet(_AtSites, RetinaNet):
    """RetinaNet with GN, also in its towers."""


class GNPanopticFPN(_AtSites, PanopticFPN):
    """Panoptic FPN with GN."""


class GNSemanticSegmentor(_AtSites, SemanticSegmentor):
    """Semantic segmentation with GN."""
