"""What a config asks for beside a backbone with GN that does not go with it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, RetinaNet

from gn_det.errors import InputError
from gn_det.modeling.bn_weights import log_once
from gn_det.modeling.with_gn import WithGN

__all__ = [
    "check_features",
    "check_p6_comes_from_res5",
    "warn_of_res5_head",
]

_INSTEAD = (
    "set MODEL.BACKBONE.NAME to build_gn_backbone, and MODEL.GN.BACKBONE to the builder that the "
    "config had before"
)


def check_features(cfg: CfgNode, backbone: Backbone) -> None:
    """Check that a pyramid reaches as high as the model wants.

    Lower levels are no matter: keys of parts that the model does not have may ask for them.

    Raises:
        InputError: it has not, with the keys that ask for them.
    """
    there = list(backbone.output_shape())
    for key, levels in _wanted_levels(cfg):
        absent = [name for name in levels if name > max(there)]
        if absent:
            raise InputError(
                f"{key} asks for {', '.join(absent)}, and {cfg.MODEL.BACKBONE.NAME} makes "
                f"{', '.join(there)} alone; {_INSTEAD} (for Detectron2's RetinaNet, "
                "build_gn_retinanet_resnet_fpn_backbone)"
            )


def check_p6_comes_from_res5(cfg: CfgNode) -> None:
    """Check that the model is a RetinaNet.

    Raises:
        InputError: it is not.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    if not (isinstance(kind, type) and issubclass(kind, RetinaNet)):
        raise InputError(
            f"{cfg.MODEL.BACKBONE.NAME} makes P6 from res5, as Detectron2's RetinaNet has it, and "
            f"{name} is none: FCOS and its descendants make it from P5, which is another "
            f"architecture; {_INSTEAD}"
        )


def warn_of_res5_head(cfg: CfgNode) -> None:
    """Say it once where the heads have a res5 stage that gets no GN."""
    name = cfg.MODEL.META_ARCHITECTURE
    kind = META_ARCH_REGISTRY.get(name) if name in META_ARCH_REGISTRY else None
    whole = isinstance(kind, type) and issubclass(kind, WithGN)
    if "res5" in cfg.MODEL.ROI_HEADS.NAME.lower() and not whole and not _is_dense(kind):
        log_once(
            f"the res5 stage of {cfg.MODEL.ROI_HEADS.NAME} keeps its own norms, "
            f"{cfg.MODEL.RESNETS.NORM or 'none'}, beside {cfg.MODEL.BACKBONE.NAME}; "
            "MODEL.META_ARCHITECTURE GNGeneralizedRCNN, or gn_det.inject on the whole model, gives "
            "it GN"
        )


def _is_dense(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, RetinaNet)


def _wanted_levels(cfg: CfgNode) -> Iterator[tuple[str, list[str]]]:
    """Yields key and value of each list of pyramid levels that a part of the model reads."""
    architecture = cfg.MODEL.META_ARCHITECTURE.removeprefix("GN")
    parts = [architecture, cfg.MODEL.PROPOSAL_GENERATOR.NAME, "ROI_HEADS"]
    for part in dict.fromkeys(each.upper() for each in parts):
        node = cfg.MODEL.get(part)
        for key, value in node.items() if isinstance(node, CfgNode) else ():
            if key.endswith("IN_FEATURES"):
                levels = [name for name in value if re.fullmatch(r"p\d", str(name))]
                yield f"MODEL.{part}.{key}", levels
