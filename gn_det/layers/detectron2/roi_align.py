"""RoIAlign with boxes in float32, in any precision of the features."""

from __future__ import annotations

from detectron2.layers import ROIAlign
from torch import Tensor, nn

__all__ = ["ExactROIAlign", "align_exactly"]


class ExactROIAlign(ROIAlign):
    """Detectron2's, which rounds its boxes to the features' dtype.

    In bfloat16 that moves a box at 1000 pixels by up to 2, while its targets stay in place.
    torchvision's operator works in float32 under autocast anyway.
    """

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """(R, C, *output_size) in input's dtype, of (N, C, H, W) features and (R, 5) boxes."""
        return super().forward(input.float(), rois).to(input.dtype)


def align_exactly(model: nn.Module) -> None:
    """Turn each ROIAlign of a model into an :class:`ExactROIAlign`, in place."""
    for module in model.modules():
        if type(module) is ROIAlign:
            module.__class__ = ExactROIAlign
