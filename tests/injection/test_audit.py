"""The audit: what it counts, groups and gives a reason for."""

from __future__ import annotations

import json

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from support import zoo
from support.models import norms_by_site
from torch import nn

from gn_det import FusedGroupNorm, audit, fuse, inject
from gn_det.injection.audit import Audit

CONFIG = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


@pytest.fixture(scope="module")
def mask_rcnn() -> nn.Module:
    """Mask R-CNN with the 4conv1fc head, GN at ALL, fused, its stem and res2 frozen."""
    torch.manual_seed(0)
    model = zoo.build(CONFIG)
    shape = ShapeSpec(channels=256, height=7, width=7)
    model.roi_heads.box_head = FastRCNNConvFCHead(shape, conv_dims=[256] * 4, fc_dims=[1024])
    inject(model, "ALL")
    model.backbone.bottom_up.freeze(2)
    return fuse(model)


def test_every_norm_is_counted_once_with_its_parameters(mask_rcnn: nn.Module) -> None:
    found = audit(mask_rcnn)
    assert found.num_norms == 69 + 2  # and RPN, and the mask head's deconvolution
    norms = [m for m in mask_rcnn.modules() if isinstance(m, FusedGroupNorm)]
    in_norms = sum(p.numel() for norm in norms for p in norm.parameters())
    assert sum(row.parameters for row in found.rows) == in_norms
    names = [name for row in found.rows for name in row.modules]
    assert len(set(names)) == 71
    assert all(isinstance(mask_rcnn.get_submodule(name), FusedGroupNorm) for name in names)
    assert {left.reason for left in found.left_alone} == {"a predictor, whose output is the result"}


def test_sites_forms_and_states_are_told(mask_rcnn: nn.Module) -> None:
    found = audit(mask_rcnn)
    assert norms_by_site(mask_rcnn) == {
        "backbone": 53, "fpn": 8, "rpn": 1, "box_head": 4, "mask_head": 4, "mask_head.deconv": 1
    }  # fmt: skip
    frozen = sum(len(row.modules) for row in found.rows if not row.trainable)
    assert frozen == 11
    forms = {row.form: 0 for row in found.rows}
    for row in found.rows:
        forms[row.form] += len(row.modules)
    assert forms == {
        "GN+ReLU": 1 + 32 + 1 + 4 + 4 + 1,
        "GN+GN+add+ReLU": 8,
        "GN+add+ReLU": 12,
        "GN": 5,
        "GN+add": 3,
    }


def test_what_was_left_alone_has_a_reason() -> None:
    found = audit(zoo.build(CONFIG)).left_alone
    left = {each.site: each for each in found if "predictor" not in each.reason}
    assert "FrozenBatchNorm2d; inject replaces it" == left["backbone"].reason
    assert len(left["backbone"].modules) == 53
    assert "sites name rpn" in left["rpn"].reason
    assert left["box_head"].modules == ("roi_heads.box_head",)
    assert "NUM_CONV" in left["box_head"].reason


def test_layers_of_transformers_are_told_apart() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2), FusedGroupNorm(8))
    (left,) = audit(model).left_alone
    assert left.modules == ("0.norm1", "0.norm2") and left.reason.startswith("LayerNorm")


def reduced() -> Audit:
    return audit(inject(nn.Sequential(nn.BatchNorm2d(48), nn.BatchNorm2d(64))))


def test_text_marks_groups_that_32_does_not_divide() -> None:
    text = str(reduced())
    assert "24*" in text and "32*" not in text
    assert "* the largest divisor of the channels below 32" in text
    assert "*" not in str(audit(inject(nn.Sequential(nn.BatchNorm2d(64)))))


def test_markdown_is_a_table_of_a_row_for_each_kind() -> None:
    lines = reduced().to_markdown().splitlines()
    assert lines[0].startswith("| site") and set(lines[1]) == {"|", "-"}
    assert lines[2].startswith("| other") and "24*" in lines[2]
    assert "2 in all" in lines[4]


def test_json_holds_every_name_and_number() -> None:
    read = json.loads(reduced().to_json())
    assert read["left_alone"] == []
    assert read["rows"][0] == {
        "site": "other",
        "modules": ["0"],
        "channels": 48,
        "num_groups": 24,
        "parameters": 96,
        "form": "GN",
        "trainable": True,
        "of_bn": False,
        "in_optimizer": None,
    }


def test_a_model_without_norms_has_an_empty_audit() -> None:
    assert audit(nn.Linear(2, 2)).num_norms == 0
    assert "0 in all" in str(audit(nn.Linear(2, 2)))
