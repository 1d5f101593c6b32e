"""RoI extractors of mmdetection's kind on features of 16 bits."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torchvision
from torch import Tensor, nn

from gn_det.mmcv_plugin import use_exact_boxes


@pytest.fixture
def roi_align(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[nn.Module]]:
    """mmcv's RoIAlign, whose compiled operator is torchvision's and refuses bfloat16."""
    extension = ModuleType("mmcv._ext")
    extension.__getattr__ = lambda name: None

    def forward(x: Tensor, rois: Tensor, output: Tensor, *unused: Tensor, **options: int) -> None:
        if x.dtype is torch.bfloat16:
            raise NotImplementedError("\"ROIAlign_forward\" not implemented for 'BFloat16'")
        size = (options["aligned_height"], options["aligned_width"])
        scale, ratio = options["spatial_scale"], options["sampling_ratio"]
        aligned = torchvision.ops.roi_align(
            x.float(), rois.float(), size, scale, ratio, options["aligned"]
        )
        output.copy_(aligned)

    extension.roi_align_forward = forward
    extension.roi_align_backward = lambda *tensors, **options: None
    package = ModuleType("mmcv.ops")  # of which only one file is imported
    package.__path__ = [f"{importlib.import_module('mmcv').__path__[0]}/ops"]
    monkeypatch.setitem(sys.modules, "mmcv._ext", extension)
    monkeypatch.setitem(sys.modules, "mmcv.ops", package)
    yield importlib.import_module("mmcv.ops.roi_align").RoIAlign
    sys.modules.pop("mmcv.ops.roi_align")


class Extractor(nn.Module):
    """As mmdetection's: boxes take the features' dtype."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.roi_layers = nn.ModuleList([kind(7, 1 / 4), kind(7, 1 / 8)])

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor) -> Tensor:
        rois = rois.type_as(feats[0])
        return sum(layer(x, rois) for layer, x in zip(self.roi_layers, feats, strict=True))


BOXES = torch.tensor([[0.0, 1001.3, 201.7, 1019.9, 233.2], [0, 1100.1, 3.3, 1111.4, 17.8]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by_name", [False, True])
def test_boxes_are_not_rounded_and_features_keep_their_dtype(
    dtype: torch.dtype, by_name: bool, roi_align: type[nn.Module]
) -> None:
    torch.manual_seed(0)
    feats = tuple(torch.randn(1, 4, 256 // s, 1344 // s).to(dtype) for s in (4, 8))
    extractor = Extractor(roi_align)
    expected = extractor([x.float() for x in feats], BOXES).to(dtype)
    if dtype is torch.float16:
        assert not torch.equal(extractor(feats, BOXES), expected)
    use_exact_boxes(extractor)
    use_exact_boxes(extractor)  # again changes nothing
    assert len(extractor._forward_pre_hooks) == 1
    for model in (extractor, copy.deepcopy(extractor)):
        actual = model(feats=feats, rois=BOXES) if by_name else model(feats, BOXES)
        assert actual.dtype is dtype and torch.equal(actual, expected)


def test_without_it_bfloat16_is_refused_by_the_operator(roi_align: type[nn.Module]) -> None:
    feats = tuple(torch.randn(1, 4, 64 // s, 64 // s).bfloat16() for s in (4, 8))
    with pytest.raises(NotImplementedError, match="BFloat16"):
        Extractor(roi_align)(feats, BOXES)
    alone = roi_align(7, 1 / 4)
    use_exact_boxes(alone)
    assert alone(feats[0], BOXES).dtype is torch.bfloat16


def test_other_modules_are_left_alone(roi_align: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    use_exact_boxes(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
