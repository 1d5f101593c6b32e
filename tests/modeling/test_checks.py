"""Backbones with GN that do not go with the rest of a config."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

import pytest
from detectron2.config import CfgNode, configurable, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    GeneralizedRCNN,
    build_backbone,
    build_model,
)
from detectron2.modeling.backbone import FPN, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from support import zoo
from torch import nn

import gn_det
from gn_det.modeling import WithGN
from gn_det.modeling.bn_weights import log_once

pytestmark = pytest.mark.usefixtures("without_memory")


def plain_config() -> CfgNode:
    """Detectron2's Mask R-CNN R-50-FPN."""
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.merge_from_other_cfg(
        zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    )
    cfg.MODEL.DEVICE = "meta"
    return cfg


def build_theirs_p67_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """P6 and P7 from P5, as FCOS and its descendants have them."""
    bottom_up = build_resnet_backbone(cfg, input_shape)
    top = LastLevelP6P7(256, 256, in_feature="p5")
    return FPN(bottom_up, ["res3", "res4", "res5"], 256, top_block=top)


class FCOS(nn.Module):
    """A proposal generator of theirs."""

    def __init__(self, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> None:
        super().__init__()
        self.tower = nn.Conv2d(input_shape[cfg.MODEL.FCOS.IN_FEATURES[-1]].channels, 4, 3)


class OldRCNN(GeneralizedRCNN):
    """A meta-architecture of theirs that takes the config and nothing else."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.depth = cfg.MODEL.RESNETS.DEPTH


class NewRCNN(GeneralizedRCNN):
    """One with an argument of its own."""

    @configurable
    def __init__(self, *, depth: int, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.depth = depth

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, object]:
        return {**super().from_config(cfg), "depth": cfg.MODEL.RESNETS.DEPTH}


class FlatModel(nn.Module):
    """One that builds its parts itself."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)
        self.depth = cfg.MODEL.RESNETS.DEPTH


class GNOldRCNN(WithGN, OldRCNN):
    pass


class GNNewRCNN(WithGN, NewRCNN):
    pass


class GNFlatModel(WithGN, FlatModel):
    pass


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    theirs = {
        BACKBONE_REGISTRY: [build_theirs_p67_backbone],
        PROPOSAL_GENERATOR_REGISTRY: [FCOS],
        META_ARCH_REGISTRY: [OldRCNN, NewRCNN, FlatModel, GNOldRCNN, GNNewRCNN, GNFlatModel],
    }
    for registry, entries in theirs.items():
        known = registry._obj_map | {entry.__name__: entry for entry in entries}
        monkeypatch.setattr(registry, "_obj_map", known)
    log_once.cache_clear()
    yield


def fcos_config(backbone: str) -> CfgNode:
    cfg = plain_config()
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg.MODEL.PROPOSAL_GENERATOR.NAME = "FCOS"
    cfg.MODEL.FCOS = CfgNode({"IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"]})
    return cfg


def test_a_level_that_the_pyramid_lacks_is_told() -> None:
    told = (
        r"MODEL\.FCOS\.IN_FEATURES asks for p7, and build_gn_resnet_fpn_backbone makes p2, p3, p4, "
        r"p5, p6 alone; set MODEL\.BACKBONE\.NAME to build_gn_backbone"
    )
    with pytest.raises(gn_det.InputError, match=told):
        build_model(fcos_config("build_gn_resnet_fpn_backbone"))


@pytest.mark.parametrize("architecture", ["RetinaNet", "GNRetinaNet"])
def test_retinanets_levels_need_retinanets_pyramid(architecture: str) -> None:
    cfg = plain_config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_fpn_backbone"
    with pytest.raises(gn_det.InputError, match=r"MODEL\.RETINANET\.IN_FEATURES asks for p7"):
        build_backbone(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_gn_retinanet_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    assert list(build_backbone(cfg).output_shape())[-1] == "p7"


@pytest.mark.parametrize("architecture", ["ProposalNetwork", "GNGeneralizedRCNN", "Unknown"])
def test_a_p6_of_another_architecture_is_refused(architecture: str) -> None:
    cfg = fcos_config("build_gn_retinanet_resnet_fpn_backbone")
    cfg.MODEL.META_ARCHITECTURE = architecture
    told = (
        rf"makes P6 from res5, .* and {architecture} is none: FCOS .* build_gn_backbone, and MODEL"
    )
    with pytest.raises(gn_det.InputError, match=told):
        build_backbone(cfg)


def test_their_own_builder_gets_gn_and_keeps_its_architecture() -> None:
    cfg = fcos_config("build_gn_backbone")
    cfg.MODEL.GN.BACKBONE = "build_theirs_p67_backbone"
    cfg.MODEL.GN.NUM_GROUPS = 16
    model = build_model(cfg)
    assert model.backbone.top_block.p6.in_channels == 256
    audit = gn_det.audit(model)
    counts: dict[str, int] = {}
    for row in audit.rows:
        counts[row.site] = counts.get(row.site, 0) + len(row.modules)
    assert counts == {"backbone": 53, "fpn": 6}
    assert sum(len(row.modules) for row in audit.rows if row.form == "GN+add+ReLU") > 0
    assert {row.num_groups for row in audit.rows} == {16}


@pytest.mark.parametrize("name", ["", "build_theirs_p67", "build_gn_backbone"])
def test_a_builder_that_cannot_be_wrapped_is_told(name: str) -> None:
    cfg = fcos_config("build_gn_backbone")
    cfg.MODEL.GN.BACKBONE = name
    with pytest.raises(gn_det.InputError, match=rf"MODEL\.GN\.BACKBONE is '{name}'.*; name the"):
        build_backbone(cfg)


@pytest.mark.parametrize("kind", [GNOldRCNN, GNNewRCNN, GNFlatModel])
def test_a_meta_architecture_of_theirs_takes_gn(kind: type) -> None:
    cfg = plain_config()
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.META_ARCHITECTURE = kind.__name__
    cfg.MODEL.GN.SITES, cfg.MODEL.GN.NUM_GROUPS = ["backbone", "fpn"], 16
    model = build_model(cfg)
    norms = [module for module in model.modules() if isinstance(module, gn_det.FusedGroupNorm)]
    assert len(norms) == 61 and {norm.num_groups for norm in norms} == {16}
    assert model.depth == 50
    assert {"GN+add+ReLU", "GN+ReLU"} <= {row.form for row in gn_det.audit(model).rows}


def test_arguments_go_before_the_config() -> None:
    cfg = plain_config()
    model = GNOldRCNN(cfg, sites="backbone", channels_per_group=8)
    rows = gn_det.audit(model).rows
    assert {row.site for row in rows} == {"backbone"}
    assert {row.channels // row.num_groups for row in rows} == {8}


MSRA = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize(
    ("weights", "freeze_at", "told"),
    [
        (MSRA, 2, "has BN: .*FREEZE_AT 2 freezes them so"),
        (MSRA, 0, "has BN: GN takes its γ and β without its statistics. Name"),
        ("detectron2://ImageNetPretrained/torchvision/R-50.pkl", 0, "has BN"),
        ("detectron2://ImageNetPretrained/FAIR/X-101-32x8d.pkl", 2, "has BN"),
        ("detectron2://ImageNetPretrained/FAIR/R-50-GN.pkl", 2, None),
        ("", 2, None),
        ("output/mine.pth", 2, None),
    ],
)
def test_weights_with_bn_are_said_once(
    weights: str, freeze_at: int, told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = plain_config()
    cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = weights, freeze_at
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_fpn_backbone"
    with caplog.at_level(logging.WARNING, "gn_det"):
        for _ in range(2):
            build_backbone(cfg)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == (told is not None)
    if told:
        assert re.search(told, messages[0])


@pytest.mark.parametrize("component", ["backbone", "model"])
def test_a_hand_over_has_the_statistics_of_bn(
    component: str, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = plain_config()
    cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT = MSRA, 0
    cfg.MODEL.GN.HAND_OVER_STEPS = 200
    if component == "backbone":
        cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_fpn_backbone"
    else:
        cfg.MODEL.META_ARCHITECTURE = "GNGeneralizedRCNN"
    with caplog.at_level(logging.WARNING, "gn_det"):
        build_model(cfg)
    assert not caplog.records


@pytest.mark.parametrize(
    ("sites", "told"),
    [(["default"], 1), (["rpn", "backbone"], 1), (["ALL"], 1), (["fpn", "mask_head"], 0)],
)
def test_a_whole_model_says_it_where_its_backbone_gets_gn(
    sites: list[str], told: int, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = plain_config()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.GN.SITES = "GNGeneralizedRCNN", sites
    cfg.MODEL.WEIGHTS = MSRA
    with caplog.at_level(logging.WARNING, "gn_det"):
        build_model(cfg)
    assert len(caplog.records) == told


@pytest.mark.parametrize(
    ("architecture", "told"), [("GeneralizedRCNN", True), ("GNGeneralizedRCNN", False)]
)
def test_a_res5_head_that_keeps_its_norms_is_said(
    architecture: str, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = plain_config()
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res4"]
    cfg.MODEL.ROI_HEADS.NAME = "Res5ROIHeads"
    with caplog.at_level(logging.WARNING, "gn_det"):
        build_backbone(cfg)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == told
    if told:
        assert "the res5 stage of Res5ROIHeads keeps its own norms, FrozenBN" in messages[0]
