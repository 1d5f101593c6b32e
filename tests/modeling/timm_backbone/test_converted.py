"""Weights of timm backbones in configs with other norms than they were made for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from support.programs import ROOT

import gn_det
from gn_det import InputError
from gn_det.config import load_config
from gn_det.modeling import TimmBackbone
from gn_det.modeling.bn_weights import log_once
from gn_det.modeling.timm_backbone.converted import write_converted

MASK_RCNN = ROOT / "configs/timm/mask_rcnn_effnet_lite0_FPN.yaml"
GN = ["MODEL.META_ARCHITECTURE", "GNGeneralizedRCNN"]
BODY = [*GN, "MODEL.GN.SITES", "['backbone']"]
ONE_GROUP = ["MODEL.GN.NUM_GROUPS", "1"]
HAND_OVER = ["MODEL.GN.HAND_OVER_STEPS", "200"]


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    log_once.cache_clear()
    yield
    log_once.cache_clear()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights with BN, those converted to one group, and those of a network that has GN."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    state = timm.create_model("resnet10t").state_dict()
    for name, value in state.items():
        if name.endswith(("running_var", "bias")):
            value.uniform_(0.5, 1.5)
    torch.save(state, folder / "bn.pth")
    write_converted(folder / "converted.pth", state, load_config(MASK_RCNN, [*BODY, *ONE_GROUP]))
    return {name: folder / f"{name}.pth" for name in ("bn", "converted")}


def built(weights: Path, keys: list[str], caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said while a model is built."""
    of_timm = ["MODEL.TIMM.NAME", "resnet10t", "MODEL.TIMM.WEIGHTS", str(weights)]
    pixels = ["MODEL.PIXEL_MEAN", "[123.675,116.28,103.53]", "MODEL.DEVICE", "cpu"]
    with caplog.at_level(logging.WARNING, "gn_det"):
        std = ["MODEL.PIXEL_STD", "[58.395,57.12,57.375]"]
        build_model(load_config(MASK_RCNN, [*of_timm, *pixels, *std, *keys]))
    return [record.getMessage() for record in caplog.records if "MODEL.TIMM" in record.getMessage()]


@pytest.mark.parametrize(
    ("weights", "keys", "told"),
    [
        ("bn", [], None),
        ("bn", ["MODEL.TIMM.NORM", "BN"], None),
        ("bn", [*GN, "MODEL.GN.SITES", "['fpn']"], None),
        ("bn", [*BODY, *ONE_GROUP, *HAND_OVER], None),
        ("bn", BODY, "has BN: GN takes its γ and β without its statistics. Convert it"),
        ("bn", GN, "has BN: .* hand over from BN"),
        ("bn", ["MODEL.TIMM.NORM", "GN"], "has BN: GN takes its γ and β"),
        ("converted", [*BODY, *ONE_GROUP], None),
        ("converted", [*GN, *ONE_GROUP], None),
        ("converted", ["MODEL.TIMM.NORM", "GN", *ONE_GROUP], None),
        ("converted", [], "was converted for GN, and the config gives the backbone none"),
    ],
)
def test_a_warning_says_where_norms_and_weights_do_not_fit(
    weights: str,
    keys: list[str],
    told: str | None,
    files: dict[str, Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    said = built(files[weights], keys, caplog)
    assert len(said) == (told is not None)
    if told:
        assert re.search(told, said[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (BODY, r"converted for GN of .*'num_groups': 1.* MODEL.GN says .*'num_groups': 32"),
        ([*BODY, "MODEL.GN.CHANNELS_PER_GROUP", "4"], "says .*'channels_per_group': 4"),
        ([*BODY, *ONE_GROUP, "MODEL.GN.WEIGHT_STANDARDIZATION", "True"], "standardization': True"),
        ([*BODY, *ONE_GROUP, *HAND_OVER], "has γ and β of GN, and a hand-over begins with BN"),
    ],
)
def test_weights_of_other_gn_are_refused(
    keys: list[str], message: str, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InputError, match=message):
        built(files["converted"], keys, caplog)


@pytest.mark.parametrize(
    ("norm", "options", "message"),
    [
        ("GN", {"num_groups": 1}, None),
        ("GN", {"num_groups": 32}, "was converted for GN of .*'num_groups': 1,.* says .*: 32"),
        ("GN", {}, "says .*'num_groups': 32"),
        ("GN", {"channels_per_group": 4}, "says .*'channels_per_group': 4"),
        ("GN", {"num_groups": 1, "hand_over": True}, "a hand-over begins with BN"),
        ("FrozenBN", {}, None),
    ],
)
def test_weights_of_a_conversion_are_of_the_gn_that_the_class_is_given(
    norm: str, options: dict, message: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "x.pth"
    cfg = get_cfg()
    gn_det.add_gn_config(cfg)
    cfg.MODEL.GN.NUM_GROUPS = 1
    write_converted(file, timm.create_model("resnet10t").state_dict(), cfg)
    with pytest.raises(InputError, match=message) if message else nullcontext():
        TimmBackbone("resnet10t", weights=str(file), norm=norm, **options)
