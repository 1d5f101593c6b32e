"""Backbones of timm: maps, gradients and state dicts of ten families."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from detectron2.modeling import FPN
from support.timm_models import BN, of_every_family
from torch import nn

from gn_det import InputError
from gn_det.modeling import TimmBackbone


@of_every_family
def test_maps_have_the_strides_and_channels_that_they_say(name: str) -> None:
    backbone = TimmBackbone(name).eval()
    shapes = backbone.output_shape()
    assert {key: shape.stride for key, shape in shapes.items()} == {
        "res2": 4,
        "res3": 8,
        "res4": 16,
        "res5": 32,
    }
    features = backbone(torch.rand(2, 3, 64, 96))
    for key, shape in shapes.items():
        assert features[key].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)


@of_every_family
def test_maps_are_those_of_the_model_itself(name: str) -> None:
    backbone = TimmBackbone(name).eval()
    theirs = timm.create_model(name, features_only=True, out_indices=backbone.body.feature_info
                               .out_indices).eval()  # fmt: skip
    theirs.load_state_dict(backbone.body.state_dict(), strict=False)
    x = torch.rand(1, 3, 64, 64)
    for ours, wanted in zip(backbone(x).values(), theirs(x), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-3, atol=1e-4)


@of_every_family
@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_every_parameter_that_trains_gets_a_gradient(name: str, norm: str) -> None:
    backbone = TimmBackbone(name, norm=norm, freeze_at=1)
    sum(y.square().mean() for y in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    parameters = dict(backbone.named_parameters())
    trained = [key for key, parameter in parameters.items() if parameter.requires_grad]
    assert trained and len(trained) < len(parameters)
    assert not [key for key in trained if parameters[key].grad is None]
    has_bn = any(isinstance(module, BN) for module in backbone.modules())
    assert has_bn == (norm == "BN" and name != "convnext_atto")


@pytest.mark.parametrize(
    ("name", "freeze_at", "message"),
    [
        ("twins_svt_small", 1, "does not tell where this stage of twins_svt_small ends; set 0"),
        ("sequencer2d_s", 0, r"strides \[7, 14, 14, 14\], and none of 4, 8, 16, 32"),
        ("inception_v3", 0, "a map of 60x68 for a picture of 256x288, and .* 64x72 at stride 4"),
        ("levit_128s", 0, "does not take pictures of any size"),
    ],
)
def test_models_that_no_detector_can_take_are_refused(
    name: str, freeze_at: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        TimmBackbone(name, freeze_at=freeze_at)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freezeat": 2}, "a timm backbone has no option freezeat: those of GN are channels_per_"),
        ({"norm": "GN", "num_group": 8}, "no option num_group"),
        ({"num_groups": 8}, """{'num_groups': 8} is for norm "GN", and the norm is 'FrozenBN'"""),
        ({"norm": "BN", "hand_over": True}, """is for norm "GN", and the norm is 'BN'"""),
        ({"out_indices": 3}, "is 3, and has to be a list of whole numbers"),
        ({"out_indices": "3"}, "is '3', and has to be a list"),
        ({"out_indices": ["3"]}, r"is \['3'\], and has to be a list"),
        ({"out_indices": [3.0]}, r"is \[3.0\], and has to be a list"),
    ],
    ids=str,
)
def test_options_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TimmBackbone("test_resnet", **options)


@pytest.mark.parametrize(
    ("name", "out_indices", "multiple"),
    [
        ("hrnet_w18_small", [1, 2, 3], 32),
        ("hrnet_w18_small", [], 32),
        ("mobilevitv2_050", [], 64),
        ("resnet10t", [1, 2], 4),
        ("resnet10t", [], 4),
    ],
)
@pytest.mark.parametrize("size", [(64, 96), (80, 112), (48, 176)], ids=str)
def test_maps_have_their_strides_whatever_sides_the_model_takes(
    name: str, out_indices: list[int], multiple: int, size: tuple[int, int]
) -> None:
    backbone = TimmBackbone(name, out_indices=out_indices).eval()
    fpn = FPN(backbone, ["res2", "res3"], 8)
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        maps = backbone(x)
    for key, shape in backbone.output_shape().items():
        assert maps[key].shape[2:] == tuple(-(-side // shape.stride) for side in size)
    if not any(side % fpn.size_divisibility for side in size):  # to which Detectron2 pads
        fpn(x)
    padded = F.pad(x, (0, -size[1] % multiple, 0, -size[0] % multiple))
    with torch.no_grad():
        (wanted, *_) = backbone.body(padded)
    assert torch.equal(maps["res2"], wanted[..., : size[0] // 4, : size[1] // 4])


def test_position_biases_are_those_of_weights_that_come_later() -> None:
    trained, built = (TimmBackbone("tiny_vit_5m_224") for _ in range(2))
    for key, parameter in trained.named_parameters():
        if "attention_biases" in key:
            nn.init.normal_(parameter)
    built.load_state_dict(trained.state_dict())
    x = torch.rand(1, 3, 64, 64)
    expected = trained.train(False)(x)
    for key, y in built.train(False)(x).items():
        torch.testing.assert_close(y, expected[key])


@of_every_family
def test_a_state_dict_goes_out_and_in(name: str) -> None:
    ours, theirs = TimmBackbone(name).eval(), TimmBackbone(name, norm="BN").eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "num_batches" not in k})
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(ours(x).values(), theirs(x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_transformers_take_pictures_of_other_sizes(name: str) -> None:
    backbone = TimmBackbone(name, out_indices=[3]).eval()
    ((key, shape),) = backbone.output_shape().items()
    y = backbone(torch.rand(1, 3, 64, 96))[key]
    assert y.shape == (1, shape.channels, 64 // shape.stride, 96 // shape.stride)
