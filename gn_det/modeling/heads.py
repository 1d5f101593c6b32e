"""Heads for the NAME keys of Detectron2's parts."""

from __future__ import annotations

from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)

from gn_det.modeling.with_gn import WithGN

__all__ = [
    "GNFastRCNNConvFCHead",
    "GNKRCNNConvDeconvUpsampleHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNSemSegFPNHead",
    "GNStandardRPNHead",
]


class GNStandardRPNHead(WithGN, StandardRPNHead):
    """Detectron2's RPN head with GN after its 3x3 convolution."""

    sites = "rpn"


class GNFastRCNNConvFCHead(WithGN, FastRCNNConvFCHead):
    """Detectron2's conv-fc box head with GN after every convolution (the paper: 4 conv, 1 fc)."""

    sites = "box_head"


class GNMaskRCNNConvUpsampleHead(WithGN, MaskRCNNConvUpsampleHead):
    """Detectron2's mask head with GN after every 3x3 convolution."""

    sites = "mask_head"


class GNKRCNNConvDeconvUpsampleHead(WithGN, KRCNNConvDeconvUpsampleHead):
    """Detectron2's keypoint head with GN after every 3x3 convolution."""

    sites = "keypoint_head"


class GNSemSegFPNHead(WithGN, SemSegFPNHead):
    """Detectron2's semantic segmentation head with GN, its default, in the fused form."""

    sites = "sem_seg_head"
