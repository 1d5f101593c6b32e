"""The audit: what it counts, groups and gives a reason for."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
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
    assert {left.reason for left in found.left_alone} == {
        "a predictor, whose output is the result",
        "not fused: nothing follows it in FusedFPN",
    }


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


def test_one_channel_a_group_is_told_as_instance_norm() -> None:
    model = nn.Sequential(nn.BatchNorm2d(16), nn.BatchNorm2d(32), nn.BatchNorm2d(64))
    text = str(audit(inject(model)))
    assert "16* (instance norm)" in text and "32 (instance norm)" in text
    assert text.count("instance norm") == 2
    wider = audit(inject(model, num_groups=32, min_channels_per_group=4))
    assert [row.num_groups for row in wider.rows] == [4, 8, 16]
    assert "instance norm" not in str(wider)


def test_norms_that_no_optimizer_holds_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8), nn.BatchNorm2d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inject(model)
    states = {row.modules: row.state for row in audit(model, optimizer).rows}
    assert states == {("1",): "trainable, in no optimizer", ("2",): "trainable"}
    assert "in no optimizer" in str(audit(model, optimizer))
    assert "in no optimizer" not in str(audit(model))
    held = audit(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert [row.in_optimizer for row in held.rows] == [True]


def test_frozen_norms_with_the_values_of_bn_are_told_until_others_are_loaded() -> None:
    def model() -> nn.Module:
        conv = nn.Conv2d(3, 8, 1).requires_grad_(False)
        return nn.Sequential(conv, FrozenBatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))

    trained, fresh = model(), model()
    trained[1].weight.fill_(0.5)
    assert [row.state for row in audit(inject(fresh)).rows] == ["frozen", "trainable"]
    assert [row.state for row in audit(inject(trained)).rows] == [
        "frozen, γ and β of BN",
        "trainable",
    ]
    trained.load_state_dict(copy.deepcopy(trained.state_dict()))
    assert audit(trained).rows[0].state == "frozen"


@pytest.mark.parametrize("assign", [False, True])
def test_values_of_bn_that_are_loaded_by_name_are_told(assign: bool) -> None:
    def model() -> nn.ModuleDict:
        conv = nn.Conv2d(3, 8, 1).requires_grad_(False)
        return nn.ModuleDict({"b": nn.Sequential(conv, FrozenBatchNorm2d(8))})

    trained, ours = model(), inject(model())
    trained["b"][1].weight.fill_(0.5)
    weights = trained.state_dict()
    ours.load_state_dict(weights, strict=False, assign=assign)
    (row,) = audit(ours).rows
    assert row.of_bn
    ours.load_state_dict({key: weights[key].clone() for key in ours.state_dict()})
    (row,) = audit(ours).rows
    assert not row.of_bn


def test_a_gn_of_a_class_of_its_own_is_called_one() -> None:
    class NaiveGroupNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_groups, self.weight = 4, nn.Parameter(torch.ones(8))

    (left,) = audit(nn.ModuleList([NaiveGroupNorm()])).left_alone
    assert left.reason == "NaiveGroupNorm, a GN of its own class, which stays"


@pytest.mark.parametrize(
    "name", ["MyBN", "InPlaceABN", "FRN", "Statistics", "SwitchNorm2d", "PowerNORM"]
)
def test_norms_of_kinds_that_nobody_knows_are_listed_with_their_convolution(name: str) -> None:
    norm = type(name, (nn.Module,), {})()
    norm.weight = nn.Parameter(torch.ones(8))
    if name == "Statistics":
        norm.register_buffer("running_mean", torch.zeros(8))
    left = audit(nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU())).left_alone
    assert [(each.modules, each.reason) for each in left] == [
        (("1",), f"{name}, which GN does not stand in for"),
        (("0",), f"behind it is {name}, which stays"),
    ]


def test_a_layer_of_a_graph_network_is_no_norm() -> None:
    layer = type("GNNLayer", (nn.Module,), {})()
    layer.weight = nn.Parameter(torch.ones(8))
    (left,) = audit(nn.Sequential(nn.Conv2d(3, 8, 1), layer)).left_alone
    assert left.modules == ("0",) and "stays" not in left.reason


@pytest.mark.parametrize("inside", [nn.Sigmoid, nn.Hardsigmoid])
def test_the_norm_of_a_gate_is_told(inside: type[nn.Module]) -> None:
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), inside()
    )
    left = {each.modules: each.reason for each in audit(gate).left_alone}
    assert "gate behind global pooling" in left[("2",)] and "freeze it" in left[("2",)]
    assert "in an attention or a gate" in left[("1", "3")]


def test_a_convolution_outside_of_all_parts_is_listed_by_its_owner() -> None:
    class Embedding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Conv2d(3, 8, 4, stride=4)

    (left,) = audit(nn.ModuleDict({"embed": Embedding()})).left_alone
    assert left.modules == ("embed.project",) and "Embedding has no place for one" in left.reason


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
