"""Whole models for MODEL.META_ARCHITECTURE, with GN at MODEL.GN.SITES."""

from __future__ import annotations

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


class GNGeneralizedRCNN(WithGN, GeneralizedRCNN):
    """Faster, Mask, Keypoint and Cascade R-CNN with GN."""


class GNProposalNetwork(WithGN, ProposalNetwork):
    """RPN alone with GN."""


class GNRetinaNet(WithGN, RetinaNet):
    """RetinaNet with GN, also in its towers."""


class GNPanopticFPN(WithGN, PanopticFPN):
    """Panoptic FPN with GN."""


class GNSemanticSegmentor(WithGN, SemanticSegmentor):
    """Semantic segmentation with GN."""
