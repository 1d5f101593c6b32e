"""The GN config of a BN config, and running both models on the same boxes."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from support import zoo
from support.programs import ROOT
from torch import nn

from gn_det import DetectorBatch, InputError, fuse, inject, run_on_boxes
from gn_det.config import load_config
from gn_det.injection import convert_bn
from gn_det.injection.convert_bn import bn_sites
from gn_det.studies.conversion.detector import config_with_gn


@pytest.fixture
def frozenbn() -> CfgNode:
    return load_config(ROOT / "configs/compare/frozenbn.yaml")


def test_the_config_with_gn_builds_what_inject_makes_of_the_model_with_bn(
    frozenbn: CfgNode,
) -> None:
    model = build_model(frozenbn)
    sites = bn_sites(model)
    assert sites == ["backbone"]
    twin = build_model(config_with_gn(frozenbn, sites))
    ours = fuse(inject(copy.deepcopy(model), sites))
    assert str(ours) == str(twin).replace("GNGeneralizedRCNN", "GeneralizedRCNN")
    trains = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (ours, twin)]
    assert trains[0] == trains[1]
    assert frozenbn.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def test_gn_that_is_there_stays_in_the_config() -> None:
    cfg = load_config(ROOT / "configs/compare/frozenbn_gn_heads.yaml")
    model = build_model(cfg)
    twin = config_with_gn(cfg, bn_sites(model, num_groups=32))
    assert twin.MODEL.META_ARCHITECTURE == "GNGeneralizedRCNN"
    assert twin.MODEL.GN.SITES == ["fpn", "box_head", "mask_head", "backbone"]
    keys = inject(model, "backbone").state_dict().keys()
    assert build_model(twin).state_dict().keys() == keys


def test_a_meta_architecture_without_gn_form_is_an_error(frozenbn: CfgNode) -> None:
    frozenbn.MODEL.META_ARCHITECTURE = "TheirRCNN"
    with pytest.raises(InputError, match=r"no GN form of MODEL.META_ARCHITECTURE TheirRCNN"):
        config_with_gn(frozenbn, ["backbone"])


def with_bn(name: str) -> nn.Module:
    """A model of the zoo with BN wherever its config can have it, whose statistics are settled."""
    config = zoo.model_config(name)
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"):
        config.MODEL[part].NORM = "BN"
    if "cascade" in name:
        config.MODEL.ROI_BOX_HEAD.NUM_CONV = 1
    model = build_model(config).eval()
    for module in model.backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.backbone.train()(100 * torch.randn(2, 3, 64, 96))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml", "backbone"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", "backbone fpn"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
         "backbone fpn mask_head sem_seg_head"),
        ("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml", "backbone fpn"),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "backbone fpn dense_head"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", "backbone fpn"),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml", "backbone fpn box_head mask_head"),
        ("Misc/semantic_R_50_FPN_1x.yaml", "backbone fpn sem_seg_head"),
    ],
)  # fmt: skip
def test_every_norm_of_every_kind_of_detector_is_reached(name: str, sites: str) -> None:
    model = with_bn(name)
    found = convert_bn(model, [DetectorBatch.of(model, zoo.pictures())], run_on_boxes)
    assert {row.site for row in found.rows} == set(sites.split()) and not found.not_reached
    assert not any(hasattr(module, "running_mean") for module in model.modules())


def test_pictures_without_objects_leave_the_mask_head_unreached() -> None:
    cfg = load_config(ROOT / "configs/compare/bn.yaml")
    model = build_model(cfg).eval()
    inputs = [{"image": torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)}]
    found = convert_bn(model, [DetectorBatch.of(model, inputs)], run_on_boxes)
    assert {name.rsplit(".", 2)[0] for name in found.not_reached} == {"roi_heads.mask_head"}
    assert model.roi_heads.mask_on
