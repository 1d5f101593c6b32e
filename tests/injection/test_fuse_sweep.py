"""How many of the norms that a ReLU or an addition follows are fused, over families of models.

What follows is observed as the models run (tests/support/following.py), also after fuse: a norm
that is still called by itself is not fused, whatever its form says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import zoo
from support.following import called_alone, followed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchvision import models

from gn_det import fuse, inject
from gn_det.injection.fuse import why_not_fused

# Family: norms that a ReLU or an addition follows, and how many of them are fused. Where two norms
# are added and no ReLU follows, the addition is one norm's.
TORCHVISION = {
    "resnet18": (20, 20),
    "resnet50": (53, 53),
    "resnext50_32x4d": (53, 53),
    "wide_resnet50_2": (53, 53),
    "regnet_x_400mf": (71, 71),
    "regnet_y_400mf": (53, 53),
    "mobilenet_v2": (10, 10),
    "mnasnet1_0": (45, 45),
    "shufflenet_v2_x1_0": (37, 37),
    "googlenet": (57, 57),
    "vgg11_bn": (8, 8),
    # Its layers take a tensor or a list, and ask which.
    "densenet121": (121, 5),
}
# Those whose every norm takes a ReLU in by inject, as their classes hold both, are not among them.
TIMM = {
    "resnet18": (20, 20),
    "resnet50d": (55, 55),
    "seresnet50": (37, 37),
    "skresnet18": (12, 12),
    "res2net50_26w_4s": (85, 85),
    "resnest50d": (55, 55),
    "regnetx_004": (26, 26),
    "regnety_004": (20, 20),
    "dla34": (37, 33),
    "hrnet_w18_small": (81, 76),
    "selecsls42": (41, 41),
    "gernet_s": (19, 19),
    "repvgg_a0": (61, 27),
    "vgg11_bn": (8, 8),
    "xception41": (46, 42),
    "ghostnet_100": (38, 37),
    "hgnet_tiny": (33, 33),
    "mobilenetv2_100": (10, 10),
    "resnet50_gn": (53, 53),
    "hardcorenas_a": (5, 5),
}
# Their FPN loops over the levels of a dict, which torch.fx cannot.
DETECTION = {
    "fasterrcnn_resnet50_fpn_v2": (62, 58),
    "maskrcnn_resnet50_fpn": (62, 58),
    "keypointrcnn_resnet50_fpn": (65, 61),
    "retinanet_resnet50_fpn_v2": (64, 60),
    "fcos_resnet50_fpn": (64, 60),
}


def bits(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """What a step in training computes."""
    model.train()
    torch.manual_seed(0)
    y = model(x)
    loss = sum(each.square().mean() for each in tree_leaves(y) if isinstance(each, Tensor))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def counted(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[int, int]:
    """The norms that something follows, and how many of them are not called alone after fuse."""
    following = followed(model, run)
    return len(following), len(following - called_alone(fuse(model), run))


def classifier(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        return pytest.importorskip("timm").create_model(name, pretrained=False)
    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    return getattr(models, name)(weights=None, **more)


CLASSIFIERS = [("torchvision", n) for n in TORCHVISION] + [("timm", n) for n in TIMM]


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name"), CLASSIFIERS)
def test_a_family_of_classifiers_is_fused_and_trains_to_the_same_bits(
    library: str, name: str
) -> None:
    model, x = inject(classifier(library, name)), torch.randn(2, 3, 96, 96)
    fused = copy.deepcopy(model).eval()
    expected = (TIMM if library == "timm" else TORCHVISION)[name]
    assert counted(fused, lambda m: m(x)) == expected
    for ours, theirs in zip(bits(fused, x), bits(model, x), strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    assert bool(why_not_fused(fused)) or expected[0] == expected[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTION)
def test_a_detector_of_torchvision_is_fused(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(models.detection, name)(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=96
    )
    pictures = [torch.rand(3, 64, 96)]
    assert counted(inject(model, "ALL").eval(), lambda m: m(pictures)) == DETECTION[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.architectures())
def test_nine_norms_of_ten_that_something_follows_are_fused_in_detectron2s_zoo(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.stand_in_for_deform_conv(monkeypatch)
    torch.manual_seed(0)
    model = inject(zoo.build(name), "ALL").eval()
    following, fused = counted(model, lambda m: zoo.detect(m, zoo.pictures()))
    assert fused >= 0.9 * following


def test_nine_norms_of_ten_are_fused_in_all() -> None:
    following, fused = (
        sum(pair[i] for table in (TIMM, DETECTION) for pair in table.values()) for i in (0, 1)
    )
    assert fused >= 0.9 * following > 0
