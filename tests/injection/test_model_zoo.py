"""inject at ALL, audit, fuse and revert on the models of Detectron2's zoo, and on PointRend."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.projects.point_rend import add_pointrend_config
from support import zoo
from torch import Tensor, nn
from torch.testing import assert_close

import gn_det

FUSED = {"GN+ReLU", "GN+add", "GN+add+ReLU", "GN+GN+add+ReLU"}


def point_rend(head: str) -> nn.Module:
    """PointRend's model, whose configs are not in Detectron2's package."""
    cfg = get_cfg()
    add_pointrend_config(cfg)
    cfg.merge_from_file(str(zoo.CONFIGS / "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 8
    if head == "mask":
        cfg.MODEL.ROI_HEADS.NAME = "PointRendROIHeads"
        cfg.MODEL.ROI_MASK_HEAD.NAME = "PointRendMaskHead"
        cfg.MODEL.ROI_MASK_HEAD.POINT_HEAD_ON = True
        cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = ""
        cfg.MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    else:
        cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
        cfg.MODEL.SEM_SEG_HEAD.NAME = "PointRendSemSegHead"
        cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = cfg.MODEL.POINT_HEAD.NUM_CLASSES
    return build_model(cfg)


def compute(model: nn.Module) -> dict[str, Tensor]:
    """A training step and the predictions before it; the model keeps its state."""
    model = copy.deepcopy(model)
    return {**zoo.detect(model, zoo.pictures()), **zoo.step(model, zoo.pictures())}


def check(model: nn.Module) -> None:
    gn_det.inject(model, "ALL")
    keys, plain = list(model.state_dict()), compute(model)
    audit = gn_det.audit(model)
    assert {row.form for row in audit.rows} <= {"GN", "GN+ReLU"}
    reasons = [left.reason for left in audit.left_alone]
    assert not any("inject" in reason for reason in reasons), reasons

    gn_det.fuse(model)
    fused_audit = gn_det.audit(model)
    assert fused_audit.num_norms == audit.num_norms
    assert {row.form for row in fused_audit.rows} & FUSED
    assert_equal(compute(model), plain)
    assert list(model.state_dict()) == keys

    gn_det.revert(model)
    assert sum(type(m) is nn.GroupNorm for m in model.modules()) == audit.num_norms
    assert_equal(compute(model), plain)
    assert list(model.state_dict()) == keys


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To the rounding of float32."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = 1e-5 * value.double().abs().max().item() if value.numel() else 0
        assert_close(actual[name], value, atol=scale, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def config_marks() -> list:
    names = zoo.architectures()
    return [n if n in zoo.FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", config_marks())
def test_a_model_of_the_zoo_computes_the_same_fused_and_reverted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.stand_in_for_deform_conv(monkeypatch)
    check(zoo.build(name))


@pytest.mark.parametrize("head", [pytest.param("mask", marks=pytest.mark.slow), "semantic"])
def test_point_rend_computes_the_same_fused_and_reverted(head: str) -> None:
    model = point_rend(head)
    check(model)
    sites = {row.site for row in gn_det.audit(model).rows}
    assert "point_head" in sites


def test_what_is_left_out_is_in_the_zoo() -> None:
    assert all(Path(zoo.CONFIGS / name).is_file() for name in zoo.LEFT_OUT)
    assert set(zoo.FAMILIES) <= set(zoo.architectures())
