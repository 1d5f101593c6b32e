"""What is wrong with a config is one line, also where Detectron2's parts find it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import gn_det
from gn_det import InputError
from gn_det.config import load_config
from gn_det.engine.building import building
from gn_det.engine.trainer import build_model

# Overrides that only the part itself can judge, and what it says.
CANNOT = [
    ("MODEL.META_ARCHITECTURE GNRetinaNet", "KeyError 'p7' .*p7 is in MODEL.RETINANET.IN_FEATURES"),
    ("MODEL.RESNETS.NUM_GROUPS 3", "Must set MODEL.RESNETS.NUM_GROUPS = 1"),
    ("MODEL.RESNETS.DEFORM_ON_PER_STAGE [True,True,True,True]", "unsupported for R18/R34"),
    ("MODEL.ROI_HEADS.IN_FEATURES ['res4']", "'res4' .*res4 is in .*MODEL.ROI_HEADS.IN_FEATURES"),
    ("MODEL.FPN.IN_FEATURES ['res3']", "'p2' .*MODEL.RPN.IN_FEATURES, MODEL.ROI_HEADS.IN_FEATURES"),
    ("MODEL.ROI_HEADS.IN_FEATURES ['p2','p5']", "do not form a pyramid"),
    ("MODEL.ROI_HEADS.NAME CascadeROIHeads", "only support class-agnostic regression"),
    ("MODEL.ROI_HEADS.NAME Res5ROIHeads", r"assert len\(in_features\) == 1|assert len\(self"),
    ("MODEL.ROI_BOX_HEAD.NUM_CONV 0 MODEL.ROI_BOX_HEAD.NUM_FC 0", "AssertionError"),
    ("MODEL.ROI_BOX_HEAD.USE_FED_LOSS True", "sigmoid cross entropy"),
    ("MODEL.FPN.IN_FEATURES ['res6']", "KeyError 'res6'"),
]


@pytest.mark.parametrize(("overrides", "message"), CANNOT)
def test_a_model_that_cannot_be_built_is_one_line_with_the_reason(
    overrides: str, message: str
) -> None:
    cfg = load_config("configs/small/quickstart.yaml", overrides.split())
    with pytest.raises(InputError, match=f"the model cannot be built as .*{message}") as raised:
        build_model(cfg)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (lambda: {}["absent"], InputError),
        (lambda: gn_det.default_num_groups(0), ValueError),  # raised in gn_det's files
    ],
)
def test_an_exception_of_gn_dets_own_keeps_its_trace(part: Callable, kind: type) -> None:
    with pytest.raises(kind) as raised, building("it"):
        part()
    assert type(raised.value) is kind
