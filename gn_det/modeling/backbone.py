"""Backbones for MODEL.BACKBONE.NAME."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN
from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone

from gn_det.injection import inject

__all__ = ["build_gn_resnet_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN with GN after every convolution of the ResNet and the FPN."""
    return inject(build_resnet_fpn_backbone(cfg, input_shape), cfg.MODEL.GN.NUM_GROUPS)
