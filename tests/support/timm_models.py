"""Models of timm of ten families, and configs with one as the backbone."""

from __future__ import annotations

import pytest
from detectron2.config import CfgNode, get_cfg
from torch import nn

import gn_det

FAMILIES = {
    "ResNet": "resnet10t",
    "ResNet-D": "resnet18d",
    "RegNet": "regnetx_002",
    "EfficientNet-Lite": "tf_efficientnet_lite0",
    "MobileNetV3": "mobilenetv3_small_050",
    "ConvNeXt": "convnext_atto",
    "DLA": "dla46_c",
    "HRNet": "hrnet_w18_small",
    "DenseNet": "densenet121",
    "VoVNet": "ese_vovnet19b_slim_dw",
}
# What they are made of is in another family, too.
ALIKE = ("ResNet-D", "RegNet", "MobileNetV3", "DLA", "VoVNet")
of_every_family = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, id=family, marks=pytest.mark.slow if family in ALIKE else ())
        for family, name in FAMILIES.items()
    ],
)
BN = nn.modules.batchnorm._BatchNorm


def config(**keys: object) -> CfgNode:
    """A config with the keys of MODEL.TIMM, whose input is that of most models."""
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_fpn_backbone", 0
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.28, 103.53]
    cfg.MODEL.PIXEL_STD = [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    for key, value in keys.items():
        cfg.MODEL.TIMM[key] = value
    return cfg
