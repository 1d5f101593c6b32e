"""timm's models as backbones of Detectron2's detectors.

MODEL.TIMM.NAME names the model; ``builders.py`` is where the config comes in, ``backbone.py`` the
class that LazyConfigs build.
"""

from gn_det.modeling.timm_backbone.backbone import TimmBackbone
from gn_det.modeling.timm_backbone.builders import (
    build_timm_backbone,
    build_timm_fpn_backbone,
    build_timm_retinanet_fpn_backbone,
    freeze_unread_maps,
)
from gn_det.modeling.timm_backbone.frozen_norm import FrozenBatchNorm1d, FrozenBatchNormAct2d
from gn_det.modeling.timm_backbone.input import check_timm_input, timm_input
from gn_det.modeling.timm_backbone.names import timm_name_problem

__all__ = [
    "FrozenBatchNorm1d",
    "FrozenBatchNormAct2d",
    "TimmBackbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_retinanet_fpn_backbone",
    "check_timm_input",
    "freeze_unread_maps",
    "timm_input",
    "timm_name_problem",
]
