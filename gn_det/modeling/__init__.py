"""Entries for Detectron2's registries: Detectron2's component, with GN injected and fused, and
timm's models as backbones.

Importing this package registers them. WithGN makes such an entry of any other class.
"""

from gn_det.modeling.backbone import (
    build_gn_backbone,
    build_gn_resnet_backbone,
    build_gn_resnet_fpn_backbone,
    build_gn_retinanet_resnet_fpn_backbone,
)
from gn_det.modeling.heads import (
    GNFastRCNNConvFCHead,
    GNKRCNNConvDeconvUpsampleHead,
    GNMaskRCNNConvUpsampleHead,
    GNSemSegFPNHead,
    GNStandardRPNHead,
)
from gn_det.modeling.meta_arch import (
    GNGeneralizedRCNN,
    GNPanopticFPN,
    GNProposalNetwork,
    GNRetinaNet,
    GNSemanticSegmentor,
)
from gn_det.modeling.registration import register
from gn_det.modeling.timm_backbone import (
    TimmBackbone,
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_timm_retinanet_fpn_backbone,
)
from gn_det.modeling.with_gn import WithGN

__all__ = [
    "GNFastRCNNConvFCHead",
    "GNGeneralizedRCNN",
    "GNKRCNNConvDeconvUpsampleHead",
    "GNMaskRCNNConvUpsampleHead",
    "GNPanopticFPN",
    "GNProposalNetwork",
    "GNRetinaNet",
    "GNSemSegFPNHead",
    "GNSemanticSegmentor",
    "GNStandardRPNHead",
    "TimmBackbone",
    "WithGN",
    "build_gn_backbone",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_retinanet_fpn_backbone",
]

register()
