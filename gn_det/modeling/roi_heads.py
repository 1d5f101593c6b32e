"""Heads for MODEL.ROI_BOX_HEAD.NAME and MODEL.ROI_MASK_HEAD.NAME."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import (
    ROI_BOX_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    FastRCNNConvFCHead,
    MaskRCNNConvUpsampleHead,
)

from gn_det.injection import inject

__all__ = ["GNFastRCNNConvFCHead", "GNMaskRCNNConvUpsampleHead"]


class _InjectGN:
    """Builds the head that follows in the method resolution order, then injects GN.

    Args:
        input_shape: shape of the pooled RoI features.
        num_groups: see :func:`gn_det.inject`.
        kwargs: those of the Detectron2 head.

    Raises:
        InputError: the head has no convolution.
    """

    @configurable
    def __init__(self, input_shape: ShapeSpec, *, num_groups: int = 32, **kwargs: Any) -> None:
        super().__init__(input_shape, **kwargs)
        inject(self, num_groups)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), "num_groups": cfg.MODEL.GN.NUM_GROUPS}


@ROI_BOX_HEAD_REGISTRY.register()
class GNFastRCNNConvFCHead(_InjectGN, FastRCNNConvFCHead):
    """Detectron2's conv-fc box head with GN after every convolution (the paper: 4 conv, 1 fc)."""


@ROI_MASK_HEAD_REGISTRY.register()
class GNMaskRCNNConvUpsampleHead(_InjectGN, MaskRCNNConvUpsampleHead):
    """Detectron2's mask head with GN after every 3x3 convolution."""
