"""Entries of Detectron2's registry of backbones: timm's models, plain and with FPN."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from itertools import pairwise

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn

from gn_det.errors import InputError
from gn_det.modeling.timm_backbone.backbone import TimmBackbone
from gn_det.modeling.timm_backbone.converted import check_gn_of_weights
from gn_det.modeling.timm_backbone.input import check_input
from gn_det.modeling.with_gn import (
    builder_of_backbone,
    gn_options_from_config,
    inject_options_from_config,
    puts_gn_into_the_backbone,
    with_gn,
)

__all__ = [
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "build_timm_retinanet_fpn_backbone",
    "freeze_unread_maps",
]


def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """The model MODEL.TIMM.NAME of timm, for C4-like models.

    Raises:
        InputError: see :class:`TimmBackbone`; MODEL.TIMM.NAME is empty, MODEL.PIXEL_MEAN,
            MODEL.PIXEL_STD or INPUT.FORMAT is not that of timm's weights, or these were converted
            for other norms than those of the config.
    """
    keys = cfg.MODEL.TIMM
    if not keys.NAME:
        raise InputError(f"{cfg.MODEL.BACKBONE.NAME} needs the name of a model in MODEL.TIMM.NAME")
    if cfg.MODEL.WEIGHTS.startswith("detectron2://"):
        raise InputError(
            f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} is of Detectron2's own models, which have no "
            f"{keys.NAME} of timm, and takes the place of MODEL.TIMM.WEIGHTS {keys.WEIGHTS!r}; set "
            'MODEL.WEIGHTS to ""'
        )
    # MODEL.WEIGHTS are those of the whole detector, the backbone included.
    weights = "" if cfg.MODEL.WEIGHTS else keys.WEIGHTS
    there = tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD), cfg.INPUT.FORMAT
    check_input(keys.NAME, there, starts_from_weights=bool(weights or cfg.MODEL.WEIGHTS))
    backbone = TimmBackbone(
        keys.NAME,
        out_indices=keys.OUT_INDICES,
        weights=weights,
        norm=keys.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        **(gn_options_from_config(cfg) if keys.NORM == "GN" else {}),
    )
    if weights and keys.NORM != "GN":
        check_gn_of_weights(
            weights,
            backbone.body,
            inject_options_from_config(cfg) if puts_gn_into_the_backbone(cfg) else None,
            hands_over=cfg.MODEL.GN.HAND_OVER_STEPS > 0,
        )
    if builder_of_backbone(cfg) == "build_timm_backbone":
        _check_heads_on_map(cfg, backbone)
    return backbone


def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's FPN, with one level more, on the model MODEL.TIMM.NAME of timm.

    FPN takes the levels MODEL.FPN.IN_FEATURES, or all where that is empty. The level that pooling
    adds is P6 behind res5.

    Raises:
        InputError: see :func:`build_timm_backbone`; a level is not there, one between two is left
            out, or the last is not read.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    in_features = _in_features(cfg, bottom_up, bottom_up.output_shape())
    top_block = LastLevelMaxPool()
    top_block.in_feature = in_features[-1].replace("res", "p")
    return _fpn(cfg, bottom_up, in_features, top_block)


def build_timm_retinanet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """Detectron2's FPN for RetinaNet, with two levels more, on the model MODEL.TIMM.NAME of timm.

    FPN takes the levels MODEL.FPN.IN_FEATURES, or those that RetinaNet reads where that is empty.

    Raises:
        InputError: see :func:`build_timm_fpn_backbone`; RetinaNet does not read a level.
    """
    bottom_up = build_timm_backbone(cfg, input_shape)
    there = [*bottom_up.output_shape()]
    if cfg.MODEL.META_ARCHITECTURE.endswith("RetinaNet"):
        read = [name.replace("p", "res") for name in cfg.MODEL.RETINANET.IN_FEATURES]
        there = [name for name in there if name in read]
        given = [*cfg.MODEL.FPN.IN_FEATURES]
        unread = [name for name in given if name not in read]
        if unread or not there:
            key = "MODEL.FPN.IN_FEATURES" if given else "MODEL.TIMM.OUT_INDICES"
            raise InputError(
                f"{key} has {', '.join(unread or bottom_up.output_shape())}, and "
                f"MODEL.RETINANET.IN_FEATURES {list(cfg.MODEL.RETINANET.IN_FEATURES)} reads none "
                "of them; name the same levels in both"
            )
    in_features = _in_features(cfg, bottom_up, there)
    last = in_features[-1]
    channels = bottom_up.output_shape()[last].channels
    top_block = LastLevelP6P7(channels, cfg.MODEL.FPN.OUT_CHANNELS, last)
    return _fpn(cfg, bottom_up, in_features, top_block)


def _in_features(cfg: CfgNode, bottom_up: TimmBackbone, by_default: Iterable[str]) -> list[str]:
    """The levels that FPN takes; what leads to others alone does not train."""
    there = bottom_up.output_shape()
    in_features = list(cfg.MODEL.FPN.IN_FEATURES) or [*by_default]
    absent = [name for name in in_features if name not in there]
    if absent:
        raise InputError(
            f"MODEL.FPN.IN_FEATURES has {', '.join(absent)}, and {cfg.MODEL.TIMM.NAME} gives "
            f"{', '.join(f'{name} (stride {shape.stride})' for name, shape in there.items())}; "
            "name some of these, or set MODEL.TIMM.OUT_INDICES"
        )
    strides = [there[name].stride for name in in_features]
    if any(after != 2 * before for before, after in pairwise(strides)):
        raise InputError(
            "FPN takes levels of which each has twice the stride of the one before, and "
            f"MODEL.FPN.IN_FEATURES, or else MODEL.TIMM.OUT_INDICES, names "
            f"{', '.join(in_features)}, of strides {strides}"
        )
    _check_last_is_read(bottom_up, "MODEL.FPN.IN_FEATURES", in_features)
    bottom_up.freeze_unread(in_features)
    return in_features


def _fpn(
    cfg: CfgNode, bottom_up: TimmBackbone, in_features: list[str], top_block: nn.Module
) -> FPN:
    fpn = FPN(
        bottom_up,
        in_features,
        cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    if cfg.MODEL.TIMM.NORM == "GN":
        with_gn(fpn, "fpn", **gn_options_from_config(cfg))
    return fpn


def freeze_unread_maps(model: nn.Module) -> None:
    """Freeze what leads to no map that the FPNs of a model take, where they are on models of timm.

    The builders do that by themselves; a LazyConfig has no builder.
    """
    for module in model.modules():
        if isinstance(module, FPN) and isinstance(module.bottom_up, TimmBackbone):
            module.bottom_up.freeze_unread(module.in_features)


def _check_last_is_read(backbone: TimmBackbone, keys: str, read: Collection[str]) -> None:
    """Refuse stages that would run for nothing, and whose parameters would wait for a gradient."""
    names, indices = [*backbone.output_shape()], backbone.body.feature_info.out_indices
    end = max(place for place, name in enumerate(names) if name in read) + 1
    if end < len(names):
        raise InputError(
            f"{backbone.name} gives {', '.join(names)}, and {keys} "
            f"{'end' if ' ' in keys else 'ends'} at {names[end - 1]}: set MODEL.TIMM.OUT_INDICES "
            f"to {list(indices[:end])}"
        )


def _check_heads_on_map(cfg: CfgNode, backbone: TimmBackbone) -> None:
    """Check what reads the maps of a backbone without FPN, as far as it is Detectron2's."""
    if not cfg.MODEL.META_ARCHITECTURE.endswith("RCNN"):
        return
    there, heads = backbone.output_shape(), cfg.MODEL.ROI_HEADS
    read = {*cfg.MODEL.RPN.IN_FEATURES, *heads.IN_FEATURES}
    if not read <= there.keys():
        return  # Detectron2 names those that are not there
    _check_last_is_read(backbone, "MODEL.RPN.IN_FEATURES and MODEL.ROI_HEADS.IN_FEATURES", read)
    backbone.freeze_unread(read)
    channels, wanted = there[heads.IN_FEATURES[0]].channels, 4 * cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    if heads.NAME == "Res5ROIHeads" and channels != wanted:
        raise InputError(
            f"Res5ROIHeads takes {wanted} channels (4 · MODEL.RESNETS.RES2_OUT_CHANNELS), and "
            f"{heads.IN_FEATURES[0]} of {backbone.name} has {channels}: take "
            "build_timm_fpn_backbone with StandardROIHeads"
            + (f", or set RES2_OUT_CHANNELS to {channels // 4}" if channels % 4 == 0 else "")
        )
