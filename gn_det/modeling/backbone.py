"""Backbones for MODEL.BACKBONE.NAME."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import (
    build_resnet_fpn_backbone,
    build_retinanet_resnet_fpn_backbone,
)

from gn_det.errors import InputError
from gn_det.modeling.bn_weights import warn_of_bn_weights
from gn_det.modeling.checks import (
    check_features,
    check_p6_comes_from_res5,
    warn_of_res5_head,
)
from gn_det.modeling.with_gn import gn_options_from_config, with_gn
from gn_det.text import nearest

__all__ = [
    "build_gn_backbone",
    "build_gn_resnet_backbone",
    "build_gn_resnet_fpn_backbone",
    "build_gn_retinanet_resnet_fpn_backbone",
]


def build_gn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """Any registered backbone, MODEL.GN.BACKBONE, with GN at its default sites.

    Raises:
        InputError: MODEL.GN.BACKBONE is empty, unknown, or this function.
    """
    name = cfg.MODEL.GN.BACKBONE
    if name not in BACKBONE_REGISTRY or name == build_gn_backbone.__name__:
        registered = [each for each, _ in BACKBONE_REGISTRY]
        raise InputError(
            f"MODEL.GN.BACKBONE is {name!r}{nearest(name, registered)}; name the builder that "
            "MODEL.BACKBONE.NAME would have without gn_det, of Detectron2's BACKBONE registry"
        )
    return _with_gn(BACKBONE_REGISTRY.get(name)(cfg, input_shape), "default", cfg)


def build_gn_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """Detectron2's ResNet with GN after every convolution, for C4 and DC5 models.

    The res5 stage in the heads of a C4 model is no part of it: the meta-architecture
    GNGeneralizedRCNN gives GN to both.
    """
    return _with_gn(build_resnet_backbone(cfg, input_shape), "backbone", cfg)


def build_gn_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN with GN after every convolution of the ResNet and the FPN.

    Raises:
        InputError: the model wants a level that this pyramid does not have, such as P7.
    """
    fpn = build_resnet_fpn_backbone(cfg, input_shape)
    check_features(cfg, fpn)
    return _with_gn(fpn, ["backbone", "fpn"], cfg)


def build_gn_retinanet_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's ResNet-FPN for RetinaNet with GN everywhere but in P6 and P7.

    Raises:
        InputError: the model is no RetinaNet; others take P6 from P5, where RetinaNet takes it from
            res5.
    """
    check_p6_comes_from_res5(cfg)
    fpn = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    return _with_gn(fpn, ["backbone", "fpn"], cfg)


def _with_gn(backbone: Backbone, sites: str | list[str], cfg: CfgNode) -> Backbone:
    warn_of_bn_weights(cfg)
    warn_of_res5_head(cfg)
    return with_gn(backbone, sites, **gn_options_from_config(cfg))
