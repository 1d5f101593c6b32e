"""Backbones for MODEL.BACKBONE.NAME."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from gn_det.modeling.with_gn import gn_options_from_config, with_gn

__all__ = [
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
]


def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with GN after every convolution, for C4 and DC5 models."""
    resnet = build_resnet_backbone(cfg, input_shape)
    return with_gn(resnet, "backbone", **gn_options_from_config(cfg))


def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN with GN after every convolution of the ResNet and the FPN."""
    fpn = build_resnet_fpn_backbone(cfg, input_shape)
    return with_gn(fpn, ["backbone", "fpn"], **gn_options_from_config(cfg))


def build_gn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN for RetinaNet with GN everywhere but in P6 and P7."""
    fpn = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    return with_gn(fpn, ["backbone", "fpn"], **gn_options_from_config(cfg))
