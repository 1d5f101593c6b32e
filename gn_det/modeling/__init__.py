"""Entries for Detectron2's registries: Detectron2's component, with GN injected and fused.

Importing this package registers them.
"""

from gn_det.modeling.backbone import (
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
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
]

register()
