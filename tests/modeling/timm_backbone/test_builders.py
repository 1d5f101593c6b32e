"""Configs whose backbone is a model of timm."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, LazyCall, instantiate
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_backbone, build_model
from support.programs import ROOT
from support.timm_models import BN, config
from torch import nn

import gn_det
from gn_det import InputError
from gn_det.config import load_config
from gn_det.config.combinations import check_complete_config
from gn_det.engine import trainer as engine
from gn_det.modeling import TimmBackbone
from gn_det.modeling.timm_backbone import freeze_unread_maps

# Without FPN, on the map of stride 16, with Detectron2's last stage of a ResNet behind the RoIs.
C4 = [
    "MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.OUT_INDICES", "[1, 2, 3]",
    "MODEL.ROI_HEADS.NAME", "Res5ROIHeads",
]  # fmt: skip


def build(name: str, cfg: CfgNode) -> nn.Module:
    return BACKBONE_REGISTRY.get(name)(cfg, ShapeSpec(channels=3))


def test_fpn_takes_the_levels_that_there_are() -> None:
    fpn = build("build_timm_fpn_backbone", config(NAME="resnet18"))
    assert list(fpn(torch.rand(1, 3, 64, 64))) == ["p2", "p3", "p4", "p5", "p6"]


def test_retinanets_pyramid_ends_in_p7() -> None:
    cfg = config(NAME="resnet18")
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    fpn = build("build_timm_retinanet_fpn_backbone", cfg)
    assert list(fpn(torch.rand(1, 3, 128, 128))) == ["p3", "p4", "p5", "p6", "p7"]


def test_retinanet_has_the_levels_that_it_reads() -> None:
    cfg = config(NAME="resnet18")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    fpn = build("build_timm_retinanet_fpn_backbone", cfg)
    assert list(fpn(torch.rand(1, 3, 128, 128))) == ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    with pytest.raises(InputError, match="IN_FEATURES has res2, and .* reads none of them"):
        build("build_timm_retinanet_fpn_backbone", cfg)


@pytest.mark.parametrize(
    ("builder", "settings"),
    [
        ("build_timm_retinanet_fpn_backbone", ["MODEL.META_ARCHITECTURE", "RetinaNet"]),
        ("build_timm_fpn_backbone", ["MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']"]),
        ("build_timm_fpn_backbone", ["MODEL.FPN.IN_FEATURES", "[]"]),
        ("build_timm_fpn_backbone", ["MODEL.TIMM.OUT_INDICES", "[1, 2, 3]"]),
        ("build_timm_backbone", [
            "MODEL.RPN.IN_FEATURES", "['res5']", "MODEL.ROI_HEADS.IN_FEATURES", "['res5']",
            "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.BACKBONE.NAME",
            "build_timm_backbone",
        ]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("norm", ["BN", "GN"])
@pytest.mark.parametrize("name", ["resnet18", "hrnet_w18_small"])
def test_what_trains_gets_a_gradient_from_the_levels_that_are_read(
    name: str, norm: str, builder: str, settings: list[str]
) -> None:
    cfg = config(NAME=name, NORM=norm)
    cfg.merge_from_list(settings)
    backbone = build(builder, cfg)
    features = backbone(torch.rand(2, 3, 64, 64))
    if builder == "build_timm_backbone":
        features = {"res5": features["res5"]}
    sum(y.square().mean() for y in features.values()).backward()
    trained = {key: p for key, p in backbone.named_parameters() if p.requires_grad}
    assert trained and not [key for key, p in trained.items() if p.grad is None]


@pytest.mark.parametrize(
    "settings",
    [
        ["MODEL.TIMM.OUT_INDICES", "[1, 3]"],
        ["MODEL.FPN.IN_FEATURES", "['res3', 'res5']"],
        ["MODEL.FPN.IN_FEATURES", "['res5', 'res4', 'res3']"],
    ],
)
def test_levels_that_are_not_one_behind_the_other_are_refused(settings: list[str]) -> None:
    cfg = config(NAME="resnet18")
    cfg.merge_from_list(settings)
    with pytest.raises(InputError, match=r"each has twice the stride .* of strides \["):
        build("build_timm_fpn_backbone", cfg)


def test_build_gn_backbone_takes_a_builder_of_timms() -> None:
    cfg = config(NAME="resnet18")
    cfg.merge_from_list([
        "MODEL.BACKBONE.NAME", "build_gn_backbone", "MODEL.ROI_HEADS.NAME", "StandardROIHeads",
        "MODEL.GN.BACKBONE", "build_timm_fpn_backbone",
    ])  # fmt: skip
    check_complete_config(cfg)
    assert {row.site for row in gn_det.audit(build_backbone(cfg)).rows} == {"backbone", "fpn"}
    cfg.MODEL.GN.BACKBONE = "build_resnet_fpn_backbone"
    with pytest.raises(InputError, match="MODEL.GN.BACKBONE is build_resnet_fpn_backbone, and"):
        check_complete_config(cfg)


@pytest.mark.parametrize("levels", [["res2", "res3"], ["res3", "res4", "res5"]])
def test_what_no_fpn_takes_is_frozen_in_lazy_configs_as_well(levels: list[str]) -> None:
    body = LazyCall(TimmBackbone)(name="hrnet_w18_small", norm="BN")
    fpn = instantiate(LazyCall(FPN)(bottom_up=body, in_features=levels, out_channels=8))
    freeze_unread_maps(fpn)
    sum(y.square().mean() for y in fpn(torch.rand(2, 3, 64, 64)).values()).backward()
    assert not [k for k, p in fpn.named_parameters() if p.requires_grad and p.grad is None]


def test_plain_backbone_gives_the_maps_that_are_asked_for() -> None:
    backbone = build("build_timm_backbone", config(NAME="resnet18", OUT_INDICES=[3]))
    assert {k: s.stride for k, s in backbone.output_shape().items()} == {"res4": 16}
    # layer4 is not there, so that nothing waits for its gradient.
    assert not any("layer4" in key for key, _ in backbone.named_parameters())


def test_gn_by_the_key_and_by_the_meta_architecture() -> None:
    cfg = config(NAME="resnet18", NORM="GN")
    sites = {row.site for row in gn_det.audit(build("build_timm_fpn_backbone", cfg)).rows}
    assert sites == {"backbone", "fpn"}
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "GNRetinaNet", "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_timm_retinanet_fpn_backbone"
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16], [32], [64], [128], [256]]
    model = build_model(cfg)
    assert {row.site for row in gn_det.audit(model).rows} == {"backbone", "fpn", "dense_head"}
    assert not any(isinstance(module, (BN, FrozenBatchNorm2d)) for module in model.modules())


def test_detectron2s_own_weights_do_not_take_the_place_of_timms() -> None:
    cfg = config(NAME="resnet10t", WEIGHTS="mine.pth")
    cfg.MODEL.WEIGHTS = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    with pytest.raises(InputError, match=r"takes the place of MODEL.TIMM.WEIGHTS 'mine.pth'"):
        build("build_timm_fpn_backbone", cfg)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"OUT_INDICES": [7]}, "has 5 feature maps, 0 to 4"),
        ({"OUT_INDICES": [1, 1]}, "have strides"),
        ({"NORM": "LN"}, "not FrozenBN, BN or GN"),
        ({"NAME": ""}, "needs the name of a model in MODEL.TIMM.NAME"),
        ({"NAME": "local-dir:/nowhere"}, "timm cannot build it"),
    ],
)
def test_keys_that_cannot_work_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("build_timm_backbone", config(**{"NAME": "resnet18", **keys}))


def test_levels_that_are_not_there_are_refused() -> None:
    cfg = config(NAME="resnet18", OUT_INDICES=[2, 3, 4])
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3"]
    with pytest.raises(InputError, match=r"has res2, and resnet18 gives res3 \(stride 8\)"):
        build("build_timm_fpn_backbone", cfg)


@pytest.mark.parametrize(
    "builder", ["build_timm_fpn_backbone", "build_timm_retinanet_fpn_backbone"]
)
@pytest.mark.parametrize("indices", [[1, 2, 3], [2], [1, 2, 3, 4]])
def test_the_levels_behind_the_last_map_come_from_it(builder: str, indices: list[int]) -> None:
    cfg = config(NAME="resnet18", OUT_INDICES=indices)
    cfg.MODEL.FPN.IN_FEATURES = [f"res{i + 1}" for i in indices]
    fpn = build(builder, cfg)
    last = indices[-1] + 1
    more = 2 if "retinanet" in builder else 1
    levels = range(indices[0] + 1, last + more + 1)
    strides = {f"p{level}": 2**level for level in levels}
    assert {k: shape.stride for k, shape in fpn.output_shape().items()} == strides
    features = fpn(torch.rand(1, 3, 128, 128))
    assert {k: 128 // f.shape[-1] for k, f in features.items()} == strides
    if more == 1:
        assert torch.equal(features[f"p{last + 1}"], features[f"p{last}"][:, :, ::2, ::2])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["MODEL.FPN.IN_FEATURES", "['res2', 'res3']"],
            r"gives res2, .*, res5, and MODEL.FPN.IN_FEATURES ends at res3: .* to \[1, 2\]",
        ),
        (
            [*C4, "MODEL.TIMM.OUT_INDICES", "[]"],
            r"ROI_HEADS.IN_FEATURES end at res4: .* to \[1, 2, 3\]",
        ),
        (C4, r"takes 1024 channels .*, and res4 of resnet18 has 256: .*CHANNELS to 64"),
    ],
)
def test_maps_that_nothing_reads_or_that_the_heads_cannot_take_are_refused(
    settings: list, message: str
) -> None:
    cfg = config(NAME="resnet18")
    cfg.merge_from_list(settings)
    with pytest.raises(InputError, match=message):
        build(cfg.MODEL.BACKBONE.NAME, cfg)


def test_a_res5_head_takes_the_channels_that_it_is_told() -> None:
    cfg = config(NAME="resnet18")
    cfg.merge_from_list([*C4, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.DEVICE", "cpu"])
    check_complete_config(cfg)
    model = build_model(cfg).eval()
    with torch.no_grad():
        model([{"image": torch.zeros(3, 64, 64)}])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["MODEL.RESNETS.NORM", "GN"], "MODEL.RESNETS.NORM 'GN' changes nothing in a backbone"),
        (["MODEL.RESNETS.DEPTH", "101"], "DEPTH 101 changes nothing"),
        (
            ["MODEL.RESNETS.WIDTH_PER_GROUP", "8", "MODEL.RESNETS.STRIDE_IN_1X1", "False"],
            "WIDTH_PER_GROUP 8, MODEL.RESNETS.STRIDE_IN_1X1 False change nothing",
        ),
        (["MODEL.RESNETS.OUT_FEATURES", "['res3']"], ""),
        ([*C4, "MODEL.RESNETS.NORM", "GN"], ""),  # of the res5 head
    ],
)
def test_keys_of_resnets_that_change_nothing_are_refused(settings: list[str], message: str) -> None:
    cfg = config(NAME="resnet18")
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.merge_from_list(settings)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        check_complete_config(cfg)


def test_name_of_backbone_and_of_model_go_together() -> None:
    cfg = config(NAME="resnet18")
    check_complete_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    with pytest.raises(InputError, match="go with a model of timm"):
        check_complete_config(cfg)


def test_lazy_config_builds_the_class() -> None:
    lazy = LazyCall(FPN)(
        bottom_up=LazyCall(TimmBackbone)(name="resnet18", freeze_at=2),
        in_features=["res3", "res4", "res5"],
        out_channels=16,
    )
    fpn = instantiate(lazy)
    assert list(fpn(torch.rand(1, 3, 64, 64))) == ["p3", "p4", "p5"]


def test_a_model_that_a_checkpoint_fills_does_not_need_the_file_of_timm(tmp_path: Path) -> None:
    cfg = load_config(
        ROOT / "configs/timm/mask_rcnn_effnet_lite0_FPN.yaml",
        ["MODEL.TIMM.WEIGHTS", str(tmp_path / "gone.pth"), "MODEL.DEVICE", "cpu"],
    )
    with pytest.raises(InputError, match="no such file"):
        engine.build_model(cfg)
    engine.build_model(cfg, weights_follow=True)
    assert cfg.MODEL.TIMM.WEIGHTS == str(tmp_path / "gone.pth")
