"""Every registry entry, by a config alone; names that are taken; LazyConfigs."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from detectron2.config import CfgNode, LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_model
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from support import zoo
from support.models import norms_by_site

import gn_det
import gn_det.modeling
from gn_det import FusedGroupNorm, InputError, audit
from gn_det.layers import WeightStandardized
from gn_det.layers.recomputation import recomputes_in
from gn_det.modeling import GNFastRCNNConvFCHead, GNGeneralizedRCNN

pytestmark = pytest.mark.usefixtures("without_memory")


def config(name: str, *overrides: object) -> CfgNode:
    """A config of Detectron2's zoo with gn_det's keys."""
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.merge_from_other_cfg(zoo.model_config(name))
    cfg.merge_from_list(["MODEL.DEVICE", "meta", *overrides])
    return cfg


MASK_RCNN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.mark.parametrize(
    ("name", "meta_architecture", "expected"),
    [
        (MASK_RCNN, "GNGeneralizedRCNN", {"backbone": 53, "fpn": 8, "mask_head": 4}),
        (
            "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
            "GNGeneralizedRCNN",
            {"backbone": 53},  # ten of them in the res5 head
        ),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "GNProposalNetwork", {"backbone": 53, "fpn": 8}),
        (
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
            "GNRetinaNet",
            {"backbone": 53, "fpn": 6, "dense_head": 8},
        ),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
            "GNPanopticFPN",
            {"backbone": 53, "fpn": 8, "mask_head": 4, "sem_seg_head": 7},
        ),
        (
            "Misc/semantic_R_50_FPN_1x.yaml",
            "GNSemanticSegmentor",
            {"backbone": 53, "fpn": 8, "sem_seg_head": 7},
        ),
    ],
)
def test_a_meta_architecture_injects_at_the_default_sites_and_fuses(
    name: str, meta_architecture: str, expected: dict[str, int]
) -> None:
    model = build_model(config(name, "MODEL.META_ARCHITECTURE", meta_architecture))
    assert norms_by_site(model) == expected
    assert isinstance(model, META_ARCH_REGISTRY.get(meta_architecture.removeprefix("GN")))
    assert "GN+GN+add+ReLU" in {row.form for row in audit(model).rows}


def test_sites_and_groups_come_from_the_config() -> None:
    gn = ["MODEL.META_ARCHITECTURE", "GNGeneralizedRCNN", "MODEL.GN.SITES", ["fpn", "rpn"]]
    model = build_model(config(MASK_RCNN, *gn, "MODEL.GN.CHANNELS_PER_GROUP", 16))
    assert norms_by_site(model) == {"fpn": 8, "rpn": 1}
    assert {row.num_groups for row in audit(model).rows} == {16}


def test_weight_standardization_of_the_config_reaches_parts_and_whole_models() -> None:
    gn = [
        *("MODEL.BACKBONE.NAME", "build_gn_resnet_fpn_backbone"),
        *("MODEL.ROI_MASK_HEAD.NAME", "GNMaskRCNNConvUpsampleHead"),
        *("MODEL.GN.WEIGHT_STANDARDIZATION", True),
    ]
    rows = audit(build_model(config(MASK_RCNN, *gn))).rows
    assert all(row.form.startswith("WS+GN") for row in rows)
    whole = build_model(config(MASK_RCNN, *gn, "MODEL.META_ARCHITECTURE", "GNGeneralizedRCNN"))
    assert audit(whole).rows == rows


def test_recomputation_of_the_config_reaches_parts_and_whole_models() -> None:
    gn = [
        *("MODEL.BACKBONE.NAME", "build_gn_resnet_fpn_backbone"),
        *("MODEL.ROI_MASK_HEAD.NAME", "GNMaskRCNNConvUpsampleHead"),
        *("MODEL.GN.RECOMPUTE", True),
    ]
    parts = build_model(config(MASK_RCNN, *gn))
    recomputing = [name for name, module in parts.named_modules() if recomputes_in(module)]
    assert recomputing == ["backbone", "roi_heads.mask_head"]
    whole = build_model(config(MASK_RCNN, *gn, "MODEL.META_ARCHITECTURE", "GNGeneralizedRCNN"))
    assert recomputes_in(whole)
    assert audit(whole).rows == audit(parts).rows


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("box_head", r"site box_head: roi_heads\.box_head .*NUM_CONV.*backbone 53"),
        ("dense_head", r"site dense_head: GNGeneralizedRCNN has none"),
    ],
)
def test_a_site_of_the_config_that_matches_nothing_is_refused(site: str, message: str) -> None:
    gn = ["MODEL.META_ARCHITECTURE", "GNGeneralizedRCNN", "MODEL.GN.SITES", [site]]
    with pytest.raises(InputError, match=message):
        build_model(config(MASK_RCNN, *gn))


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        (
            "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
            ["MODEL.BACKBONE.NAME", "build_gn_resnet_backbone"],
            {"backbone": 53},
        ),
        (
            MASK_RCNN,
            ["MODEL.BACKBONE.NAME", "build_gn_resnet_fpn_backbone"],
            {"backbone": 53, "fpn": 8},
        ),
        (
            "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
            ["MODEL.BACKBONE.NAME", "build_gn_retinanet_resnet_fpn_backbone"],
            {"backbone": 53, "fpn": 6},
        ),
        (MASK_RCNN, ["MODEL.RPN.HEAD_NAME", "GNStandardRPNHead"], {"rpn": 1}),
        (
            MASK_RCNN,
            [
                *("MODEL.ROI_BOX_HEAD.NAME", "GNFastRCNNConvFCHead"),
                *("MODEL.ROI_BOX_HEAD.NUM_CONV", 4),
            ],
            {"box_head": 4},
        ),
        (
            MASK_RCNN,
            ["MODEL.ROI_MASK_HEAD.NAME", "GNMaskRCNNConvUpsampleHead"],
            {"mask_head": 4},
        ),
        (
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
            ["MODEL.ROI_KEYPOINT_HEAD.NAME", "GNKRCNNConvDeconvUpsampleHead"],
            {"keypoint_head": 8},
        ),
        (
            "Misc/semantic_R_50_FPN_1x.yaml",
            ["MODEL.SEM_SEG_HEAD.NAME", "GNSemSegFPNHead"],
            {"sem_seg_head": 7},
        ),
    ],
)
def test_a_part_injects_at_its_own_site(
    name: str, overrides: list, expected: dict[str, int]
) -> None:
    assert norms_by_site(build_model(config(name, *overrides))) == expected


def test_parts_and_the_whole_model_go_together() -> None:
    gn = [
        *("MODEL.META_ARCHITECTURE", "GNGeneralizedRCNN"),
        *("MODEL.BACKBONE.NAME", "build_gn_resnet_fpn_backbone"),
        *("MODEL.GN.NUM_GROUPS", 16),
    ]
    model = build_model(config(MASK_RCNN, *gn))
    assert norms_by_site(model) == {"backbone": 53, "fpn": 8, "mask_head": 4}
    assert {row.num_groups for row in audit(model).rows} == {16}


def test_registering_twice_is_told() -> None:
    with pytest.raises(InputError, match=r"in Detectron2's BACKBONE registry already.*once"):
        importlib.reload(gn_det.modeling)


def test_a_name_that_another_package_took_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_gn_backbone() -> None:
        pass

    entries = {**BACKBONE_REGISTRY._obj_map, "build_gn_backbone": build_gn_backbone}
    monkeypatch.setattr(BACKBONE_REGISTRY, "_obj_map", entries)
    with pytest.raises(InputError, match=rf"build_gn_backbone .* from {__name__}.*rename"):
        gn_det.modeling.register()


class TestLazyConfig:
    """By class, by one call, and through YAML."""

    def test_a_whole_model_takes_one_call(self, tmp_path: Path) -> None:
        model = zoo.model_config("COCO-Detection/fcos_R_50_FPN_1x.py")
        cfg = LazyConfig.load(str(zoo.CONFIGS / "common/train.py"))
        cfg.model = LazyCall(gn_det.fuse)(
            model=LazyCall(gn_det.inject)(model=model, sites=["default", "fpn.top_block"])
        )
        assert self.through_yaml(cfg, tmp_path) == {
            "backbone": 53, "fpn": 6, "fpn.top_block": 2, "dense_head": 8
        }  # fmt: skip

    def test_classes_take_explicit_arguments(self, tmp_path: Path) -> None:
        model = zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
        model._target_ = GNGeneralizedRCNN
        model.sites = ["backbone", "box_head"]
        model.roi_heads.box_head = LazyCall(GNFastRCNNConvFCHead)(
            input_shape=LazyCall(ShapeSpec)(channels=256, height=7, width=7),
            conv_dims=[256],
            fc_dims=[1024],
            num_groups=16,
        )
        cfg = LazyConfig.load(str(zoo.CONFIGS / "common/train.py"))
        cfg.model = model
        assert self.through_yaml(cfg, tmp_path) == {"backbone": 53, "box_head": 1}

    def test_the_layer_fits_the_norm_slots(self, tmp_path: Path) -> None:
        model = zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
        model.backbone.norm = FusedGroupNorm
        cfg = LazyConfig.load(str(zoo.CONFIGS / "common/train.py"))
        cfg.model = model
        assert self.through_yaml(cfg, tmp_path) == {"fpn": 8}

    @staticmethod
    def through_yaml(cfg: CfgNode, folder: Path) -> dict[str, int]:
        """Sites of the model of a config that was dumped and read again."""
        LazyConfig.save(cfg, str(folder / "config.yaml"))
        assert not (folder / "config.yaml.pkl").exists()
        return norms_by_site(instantiate(LazyConfig.load(str(folder / "config.yaml")).model))


def test_explicit_arguments_build_a_head_without_a_config() -> None:
    shape = ShapeSpec(channels=16, height=7, width=7)
    head = GNFastRCNNConvFCHead(
        shape, conv_dims=[64], fc_dims=[8], channels_per_group=4, weight_standardization=True
    )
    assert isinstance(head, FastRCNNConvFCHead) and head.conv1.norm.num_groups == 16
    assert isinstance(head.conv1, WeightStandardized)
