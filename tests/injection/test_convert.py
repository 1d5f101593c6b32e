"""inject on components of Detectron2."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import nn

from gn_det import FusedGroupNorm, InputError, inject


def resnet18(norm: str, freeze_at: int = 0) -> ResNet:
    stages = ResNet.make_default_stages(18, norm=norm)
    features = ["res2", "res3", "res4", "res5"]
    return ResNet(BasicStem(norm=norm), stages, out_features=features, freeze_at=freeze_at)


def norms(model: nn.Module) -> list[FusedGroupNorm]:
    return [m for m in model.modules() if isinstance(m, FusedGroupNorm)]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "GN", ""])
def test_every_norm_of_a_resnet_becomes_gn(norm: str) -> None:
    model = inject(resnet18(norm))
    assert len(norms(model)) == 20  # stem, 2 convolutions in 8 blocks, 3 shortcuts
    others = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
    assert not any(isinstance(m, others) or type(m) is nn.GroupNorm for m in model.modules())
    assert model(torch.randn(1, 3, 64, 64))["res5"].shape == (1, 512, 2, 2)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "GN"])
def test_gamma_and_beta_carry_over(norm: str) -> None:
    model = resnet18(norm)
    stem = model.stem.conv1.norm
    with torch.no_grad():
        stem.weight.copy_(torch.arange(64.0))
        stem.bias.fill_(3.0)
    inject(model)
    assert torch.equal(model.stem.conv1.norm.weight, torch.arange(64.0))
    assert torch.equal(model.stem.conv1.norm.bias, torch.full((64,), 3.0))


def test_a_convolution_that_gains_a_norm_loses_its_bias() -> None:
    head = inject(FastRCNNConvFCHead(ShapeSpec(16, 7, 7), conv_dims=[32, 32], fc_dims=[8]))
    assert head.conv1.bias is None and isinstance(head.conv2.norm, FusedGroupNorm)
    assert [name for name, _ in head.named_parameters()][:3] == [
        "conv1.weight",
        "conv1.norm.weight",
        "conv1.norm.bias",
    ]


def test_frozen_stages_stay_frozen() -> None:
    model = inject(resnet18("GN", freeze_at=2))
    frozen = [n for n in norms(model) if not n.weight.requires_grad and not n.bias.requires_grad]
    assert len(frozen) == 5  # the stem and res2


def test_fpn_reaches_its_backbone_too() -> None:
    model = inject(FPN(resnet18("FrozenBN"), ["res2", "res3", "res4", "res5"], 48))
    assert len(norms(model)) == 20 + 8
    assert model.fpn_lateral2.norm.num_groups == 24  # 48 channels
    assert model.fpn_lateral2.bias is None


def test_num_groups_is_a_limit_where_channels_do_not_divide() -> None:
    head = FastRCNNConvFCHead(ShapeSpec(16, 7, 7), conv_dims=[64, 36], fc_dims=[8])
    inject(head, num_groups=8)
    assert [n.num_groups for n in norms(head)] == [8, 6]


def test_device_dtype_and_mode_follow_the_convolution() -> None:
    model = inject(resnet18("BN").to(torch.float64).eval())
    assert all(n.weight.dtype == torch.float64 and not n.training for n in norms(model))
    assert all(n.weight.device.type == "meta" for n in norms(inject(resnet18("BN").to("meta"))))


def test_a_model_where_nothing_would_change_is_refused() -> None:
    head = FastRCNNConvFCHead(ShapeSpec(16, 7, 7), conv_dims=[], fc_dims=[8, 8])
    with pytest.raises(InputError, match=r"FastRCNNConvFCHead .*NUM_CONV"):
        inject(head)
