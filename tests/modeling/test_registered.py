"""The registry entries: the layers that Detectron2's NORM keys reach, key for key."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

import gn_det
from gn_det import FusedGroupNorm


def plain_config(norm: str = "") -> CfgNode:
    """Detectron2's R-50-FPN Mask R-CNN with the 4conv1fc head, and a NORM at every key."""
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.MODEL.DEVICE = torch.get_default_device().type
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 4, 1
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    cfg.MODEL.ROI_MASK_HEAD.NAME = "MaskRCNNConvUpsampleHead"
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
    if norm:
        for node in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
            cfg.MODEL[node].NORM = norm
    return cfg


def gn_config() -> CfgNode:
    cfg = plain_config()
    cfg.MODEL.BACKBONE.NAME = "build_gn_resnet_fpn_backbone"
    cfg.MODEL.ROI_BOX_HEAD.NAME = "GNFastRCNNConvFCHead"
    cfg.MODEL.ROI_MASK_HEAD.NAME = "GNMaskRCNNConvUpsampleHead"
    return cfg


def norms(model: nn.Module) -> list[FusedGroupNorm]:
    return [m for m in model.modules() if isinstance(m, FusedGroupNorm)]


def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Everything that the model computes for one picture, on fixed proposals' features."""
    image = torch.arange(3 * 64 * 96, dtype=torch.float32).reshape(3, 64, 96) % 255
    model.eval()
    with torch.no_grad():
        features = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        rois = torch.linspace(-1, 1, 2 * 256 * 7 * 7).reshape(2, 256, 7, 7)
        heads = {
            "box": model.roi_heads.box_head(rois),
            "mask": model.roi_heads.mask_head.layers(rois),
        }
    return {**features, **heads}


@pytest.mark.usefixtures("without_memory")
def test_r50_fpn_has_the_69_layers_of_detectron2s_gn_model_key_for_key() -> None:
    ours, theirs = build_model(gn_config()), build_model(plain_config("GN"))
    assert len(norms(ours)) == 69
    assert sum(type(m) is nn.GroupNorm for m in theirs.modules()) == 69
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [p.shape for p in ours.state_dict().values()] == [
        p.shape for p in theirs.state_dict().values()
    ]
    assert [n.num_groups for n in norms(ours)] == [32] * 69


@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_each_loads_the_others_weights_with_equal_outputs(source: str) -> None:
    ours, theirs = build_model(gn_config()), build_model(plain_config("GN"))
    giver, taker = (ours, theirs) if source == "ours" else (theirs, ours)
    for parameter in giver.parameters():
        nn.init.normal_(parameter, std=0.05)
    taker.load_state_dict(giver.state_dict(), strict=True)
    expected = outputs(giver)
    for name, value in outputs(taker).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("freeze_at", "frozen"), [(0, 0), (1, 1), (2, 11)])
@pytest.mark.usefixtures("without_memory")
def test_freeze_at_freezes_the_norms_that_it_freezes_in_detectron2(
    freeze_at: int, frozen: int
) -> None:
    counts = []
    for cfg, kind in ((gn_config(), FusedGroupNorm), (plain_config("GN"), nn.GroupNorm)):
        cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
        model = build_model(cfg)
        found = [m for m in model.modules() if isinstance(m, kind)]
        counts.append(sum(not m.weight.requires_grad for m in found))
    assert counts == [frozen, frozen]


@pytest.mark.usefixtures("without_memory")
def test_whatever_norm_the_config_names_becomes_gn() -> None:
    cfg = gn_config()
    cfg.MODEL.RESNETS.NORM = "SyncBN"
    cfg.MODEL.FPN.NORM = "BN"
    assert len(norms(build_model(cfg))) == 69


@pytest.mark.usefixtures("without_memory")
def test_num_groups_of_the_config_reaches_every_layer() -> None:
    cfg = gn_config()
    cfg.MODEL.GN.NUM_GROUPS = 16
    assert {n.num_groups for n in norms(build_model(cfg))} == {16}


@pytest.mark.usefixtures("without_memory")
def test_channels_that_32_does_not_divide_work_where_detectron2_fails() -> None:
    cfg = gn_config()
    cfg.MODEL.FPN.OUT_CHANNELS = cfg.MODEL.ROI_BOX_HEAD.CONV_DIM = 48
    assert {n.num_groups for n in norms(build_model(cfg))} == {24, 32}
    theirs = plain_config("GN")
    theirs.MODEL.FPN.OUT_CHANNELS = 48
    with pytest.raises(ValueError, match="divisible"):
        build_model(theirs)


@pytest.mark.usefixtures("without_memory")
def test_a_box_head_without_convolutions_says_to_set_num_conv() -> None:
    cfg = gn_config()
    cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 0, 2
    with pytest.raises(gn_det.InputError, match="NUM_CONV"):
        build_model(cfg)
