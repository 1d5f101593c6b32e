"""Entries for Detectron2's registries: Detectron2's component, with GN injected.

Importing this package registers them.
"""

from .backbone import build_gn_resnet_fpn_backbone
from .roi_heads import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead

__all__ = [
    "GNFastRCNNConvFCHead",
    "GNMaskRCNNConvUpsampleHead",
    "build_gn_resnet_fpn_backbone",
]
