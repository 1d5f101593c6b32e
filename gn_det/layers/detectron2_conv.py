"""Detectron2's convolution with Weight Standardization, not fused."""

from __future__ import annotations

from detectron2.layers import Conv2d
from torch import Tensor

from gn_det.layers.weight_standardization import WeightStandardized

__all__ = ["ConvWS2d"]


class ConvWS2d(WeightStandardized, Conv2d):
    """Detectron2's Conv2d with Weight Standardization: convolution, norm, activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolved(x)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x
