"""Mean, deviation and colours that timm's weights take."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from support.timm_models import config
from torch import nn

from gn_det import InputError
from gn_det.config import load_config
from gn_det.modeling import TimmBackbone, build_timm_fpn_backbone
from gn_det.modeling.timm_backbone import check_timm_input

PIXELS = ("pixel_mean", "pixel_std", "input_format")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("INPUT.FORMAT", "BGR"),
        ("MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675]),
        ("MODEL.PIXEL_STD", [1.0, 1.0, 1.0]),
        ("MODEL.PIXEL_MEAN", [0.485, 0.456, 0.406]),
        ("MODEL.PIXEL_STD", [57.375, 57.12, 58.395]),
    ],
)
def test_another_input_than_that_of_the_weights_is_refused(key: str, value: object) -> None:
    cfg = config(NAME="resnet18")
    cfg.merge_from_list([key, value])
    with pytest.raises(InputError, match=r"RGB, MODEL.PIXEL_MEAN \[123.675, 116.28, 103.53\]"):
        build_timm_fpn_backbone(cfg, ShapeSpec(channels=3))


@pytest.mark.parametrize(
    ("mean", "std", "advice"),
    [
        ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], "for pixels from 0 to 1"),
        ([128.0], [64.0], "takes pictures of 3 channels"),
        ([127.5] * 3, [127.5] * 3, "local-dir:FOLDER"),
    ],
)
def test_what_to_do_about_another_input_is_told(
    mean: list[float], std: list[float], advice: str
) -> None:
    cfg = config(NAME="resnet10t")
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = mean, std
    with pytest.raises(InputError, match=advice):
        build_timm_fpn_backbone(cfg, ShapeSpec(channels=3))


def test_a_config_that_says_no_input_gets_timms() -> None:
    keys = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME"]
    cfg = load_config(None, [*keys, "tf_efficientnet_lite0"])
    assert cfg.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.PIXEL_MEAN == cfg.MODEL.PIXEL_STD == [127.5] * 3
    said = load_config(None, [*keys, "resnet18", "INPUT.FORMAT", "BGR"])
    assert said.INPUT.FORMAT == "BGR" and said.MODEL.PIXEL_MEAN[0] == 123.675
    assert load_config(None).MODEL.PIXEL_MEAN == get_cfg().MODEL.PIXEL_MEAN
    assert load_config(None).INPUT.FORMAT == "BGR"


@pytest.mark.parametrize(
    ("change", "weights", "fits"),
    [
        ({}, True, True),
        ({"input_format": "BGR"}, True, False),
        ({"pixel_std": [1.0, 1.0, 1.0]}, True, False),
        # Detectron2's, for a random start.
        (dict(zip(PIXELS, ([103.53, 116.28, 123.675], [1.0] * 3, "BGR"), strict=True)),
         False, True),
        (dict(zip(PIXELS, ([103.53, 116.28, 123.675], [1.0] * 3, "BGR"), strict=True)),
         True, False),
    ],
)  # fmt: skip
def test_a_model_of_a_lazy_config_has_the_input_of_timms_weights(
    change: dict, weights: bool, fits: bool
) -> None:
    values = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375], "RGB")
    mean, std, colours = {**dict(zip(PIXELS, values, strict=True)), **change}.values()
    model = nn.Sequential(TimmBackbone("resnet10t", out_indices=[2]))
    model.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1))
    model.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1))
    model.input_format = colours
    with nullcontext() if fits else pytest.raises(InputError, match="of a LazyConfig"):
        check_timm_input(model, starts_from_weights=weights)
