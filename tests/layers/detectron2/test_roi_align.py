"""RoIAlign in mixed precision: boxes stay where they are."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ROIAlign
from torch import nn

from gn_det.layers.detectron2.roi_align import ExactROIAlign, align_exactly


def aligned(*, exactly: bool, dtype: torch.dtype) -> torch.Tensor:
    """What RoIAlign finds on features that hold the position, of a box far from the origin."""
    layers = nn.Sequential(ROIAlign((4, 4), 1 / 8, 0, aligned=True))
    if exactly:
        align_exactly(layers)
    positions = torch.arange(-112, 16, dtype=dtype).expand(1, 2, 128, 128)
    rois = torch.tensor([[0, 902.0, 802.0, 934.0, 834.0]])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return layers[0](positions, rois)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_are_not_rounded_to_the_precision_of_features(dtype: torch.dtype) -> None:
    exact = aligned(exactly=False, dtype=torch.float32)
    ours = aligned(exactly=True, dtype=dtype)
    assert ours.dtype == dtype and torch.equal(ours, exact.to(dtype))


def test_detectron2_rounds_them() -> None:
    exact = aligned(exactly=False, dtype=torch.float32)
    rounded = aligned(exactly=False, dtype=torch.bfloat16)
    assert (rounded - exact).abs().max() >= 0.25  # of 8 pixels


def test_subclasses_are_left_as_they_are() -> None:
    class Theirs(ROIAlign):
        pass

    layer = Theirs((4, 4), 1 / 8, 0)
    align_exactly(layer)
    assert type(layer) is Theirs and not isinstance(layer, ExactROIAlign)
