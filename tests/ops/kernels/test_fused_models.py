"""Fused blocks of Detectron2 on the kernels, against nn.GroupNorm and Detectron2's forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead
from support.models import computed, randomized
from torch import Tensor, nn
from torch.testing import assert_close

from gn_det import audit, fuse, inject, recompute, revert


class Pyramid(Backbone):
    """Two feature maps from an image, for an FPN."""

    def __init__(self) -> None:
        super().__init__()
        self.res2, self.res3 = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        res2 = self.res2(x)
        return {"res2": res2, "res3": self.res3(res2)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"res2": ShapeSpec(4, stride=2), "res3": ShapeSpec(4, stride=4)}


class MaskLayers(nn.Module):
    """A mask head without its loss."""

    def __init__(self) -> None:
        super().__init__()
        shape = ShapeSpec(channels=8, height=3, width=3)
        self.head = MaskRCNNConvUpsampleHead(shape, num_classes=1, conv_dims=[8, 8])

    def forward(self, x: Tensor) -> Tensor:
        return self.head.layers(x)


MODELS = {
    "identity": (lambda: BottleneckBlock(8, 8, bottleneck_channels=4), (1, 8, 5, 6)),
    "projection": (lambda: BottleneckBlock(8, 16, bottleneck_channels=4, stride=2), (1, 8, 5, 6)),
    "basic": (lambda: BasicBlock(8, 16, stride=2), (2, 8, 5, 6)),
    "fpn": (lambda: FPN(Pyramid(), ["res2", "res3"], 8), (1, 3, 16, 24)),
    "mask_head": (MaskLayers, (3, 8, 3, 3)),
}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_the_plain_model(
    name: str, device: torch.device
) -> None:
    build, shape = MODELS[name]
    model = randomized(inject(nn.Sequential(build()), "ALL", num_groups=2))
    fuse(model.to(device))
    assert {row.form for row in audit(model).rows} - {"GN"}
    plain = revert(copy.deepcopy(model))
    x = torch.randn(shape, device=device)
    for actual, expected in zip(computed(model, x), computed(plain, x), strict=True):
        assert_close(actual, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_gradients_are_the_same_bits(name: str, device: torch.device) -> None:
    build, shape = MODELS[name]
    model = fuse(randomized(inject(nn.Sequential(build()), "ALL", num_groups=2))).to(device)
    x = torch.randn(shape, device=device)
    expected = computed(model, x)
    for actual, plain in zip(computed(recompute(model), x), expected, strict=True):
        if device.type == "cpu":
            assert torch.equal(actual, plain)
        else:  # cuDNN may choose another algorithm
            assert_close(actual, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
