"""torchvision's detectors: the norm_layer slots, and inject where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.models import norms_by_site
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads

from gn_det import FusedGroupNorm, fuse, inject, revert

SMALL = {
    "weights": None,
    "weights_backbone": None,
    "num_classes": 3,
    "min_size": 64,
    "max_size": 96,
}


def picture() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    masks[:, 8:48, 8:40] = 1
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 48.0]]),
        "labels": torch.tensor([1]),
        "masks": masks,
        "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
    }
    return [torch.rand(3, 64, 96)], [target]


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    images, targets = picture()
    losses = []
    for _ in range(steps):
        torch.manual_seed(1)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_mask_rcnn_trains_with_gn_everywhere() -> None:
    model = fuse(inject(detection.maskrcnn_resnet50_fpn(**SMALL), "ALL"))
    assert norms_by_site(model) == {
        "backbone": 53, "fpn": 8, "rpn": 1, "mask_head": 4, "mask_head.deconv": 1
    }  # fmt: skip
    first, second = train(model.train(), 2)
    assert torch.isfinite(torch.tensor([first, second])).all() and second < first


def test_the_norm_layer_slots_take_our_layer_and_inject_does_the_rest() -> None:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=FusedGroupNorm, trainable_layers=5
    )
    model = MaskRCNN(
        backbone,
        box_head=FastRCNNConvFCHead((256, 7, 7), [256], [64], norm_layer=FusedGroupNorm),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(64, 3),
        mask_head=MaskRCNNHeads(256, [256], 1, norm_layer=FusedGroupNorm),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(256, 64, 3),
        min_size=64,
        max_size=96,
    )
    assert norms_by_site(model) == {"backbone": 20, "box_head": 1, "mask_head": 1}
    inject(model, ["fpn", "rpn"])
    assert norms_by_site(model) == {
        "backbone": 20,
        "fpn": 8,
        "rpn": 1,
        "box_head": 1,
        "mask_head": 1,
    }
    first, second = train(fuse(model).train(), 2)
    assert second < first


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (
            detection.fasterrcnn_resnet50_fpn_v2,
            {"backbone": 53, "fpn": 8, "rpn": 2, "box_head": 4},
        ),
        pytest.param(
            detection.keypointrcnn_resnet50_fpn,
            {"backbone": 53, "fpn": 8, "rpn": 1, "keypoint_head": 8},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            detection.retinanet_resnet50_fpn,
            {"backbone": 53, "fpn": 6, "fpn.top_block": 2, "dense_head": 8},
            marks=pytest.mark.slow,
        ),
        (
            detection.fcos_resnet50_fpn,
            {"backbone": 53, "fpn": 6, "fpn.top_block": 2, "dense_head": 8},
        ),
        (detection.ssdlite320_mobilenet_v3_large, None),
    ],
)
def test_every_detector_takes_gn_at_all_and_computes_the_same_fused(
    build: Callable[..., nn.Module], expected: dict[str, int] | None
) -> None:
    kwargs = dict(SMALL) if expected else {**SMALL, "min_size": 320, "max_size": 320}
    if not expected:
        del kwargs["min_size"], kwargs["max_size"]
    model = inject(build(**kwargs), "ALL").eval()
    if expected:
        assert norms_by_site(model) == expected
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    images, _ = picture()
    with torch.no_grad():
        plain = model.backbone(images[0][None])
        fused = fuse(model).backbone(images[0][None])
        reverted = revert(model).backbone(images[0][None])
    for name, level in plain.items():
        assert_close(fused[name], level)
        assert_close(reverted[name], level)
    with torch.no_grad():
        model(images)


def test_a_mask_rcnns_weights_from_before_load_but_for_the_norms() -> None:
    before = detection.maskrcnn_resnet50_fpn(**SMALL)
    after = inject(detection.maskrcnn_resnet50_fpn(**SMALL), "ALL")
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    # Those of running statistics, and the biases that gained norms make needless.
    assert all("running" in k or "num_batches" in k or k.endswith("bias") for k in unexpected)
    assert all(key.split(".")[-1] in ("weight", "bias") for key in missing)
    assert len(missing) == 2 * (8 + 1 + 4 + 1)


def test_a_classifier_takes_gn_at_its_default_sites() -> None:
    model = fuse(inject(resnet18()))
    assert norms_by_site(model) == {"other": 20}
    model(torch.randn(1, 3, 32, 32)).sum().backward()
