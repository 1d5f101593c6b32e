"""Registration: gn_det's names in Detectron2's registries."""

from __future__ import annotations

from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)

from gn_det.errors import InputError
from gn_det.modeling import backbone, heads, meta_arch, timm_backbone

__all__ = ["register"]

_ENTRIES = [
    *((BACKBONE_REGISTRY, getattr(backbone, name)) for name in backbone.__all__),
    (BACKBONE_REGISTRY, timm_backbone.build_timm_backbone),
    (BACKBONE_REGISTRY, timm_backbone.build_timm_fpn_backbone),
    (BACKBONE_REGISTRY, timm_backbone.build_timm_retinanet_fpn_backbone),
    *((META_ARCH_REGISTRY, getattr(meta_arch, name)) for name in meta_arch.__all__),
    (RPN_HEAD_REGISTRY, heads.GNStandardRPNHead),
    (ROI_BOX_HEAD_REGISTRY, heads.GNFastRCNNConvFCHead),
    (ROI_MASK_HEAD_REGISTRY, heads.GNMaskRCNNConvUpsampleHead),
    (ROI_KEYPOINT_HEAD_REGISTRY, heads.GNKRCNNConvDeconvUpsampleHead),
    (SEM_SEG_HEADS_REGISTRY, heads.GNSemSegFPNHead),
]


def register() -> None:
    """Put gn_det's names into Detectron2's registries, all or none.

    Importing gn_det.modeling calls this, once.

    Raises:
        InputError: a name is taken, by another package or by gn_det itself.
    """
    for registry, entry in _ENTRIES:
        if entry.__name__ in registry:
            taken_by = registry.get(entry.__name__).__module__
            advice = (
                "gn_det registers itself once, when gn_det.modeling is first imported"
                if taken_by == entry.__module__
                else "rename that one, or import only one of the two packages"
            )
            raise InputError(
                f"{entry.__name__} is in Detectron2's {registry._name} registry already, from "
                f"{taken_by}; {advice}"
            )
    for registry, entry in _ENTRIES:
        registry.register(entry)
