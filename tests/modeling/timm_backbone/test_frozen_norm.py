"""BN layers of timm that are frozen."""

from __future__ import annotations

import pytest
import timm
import timm.layers
import torch
from torch import nn

import gn_det
from gn_det.modeling import TimmBackbone
from gn_det.modeling.timm_backbone.frozen_norm import FrozenBatchNormAct2d, freeze_batch_norms


@pytest.mark.parametrize(
    "name",
    [
        "skresnet18",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("rexnet_100", "resnest14d", "nextvit_small")
        ),
    ],
)
def test_norms_of_gates_and_of_linear_layers_are_frozen_so_that_one_image_trains(name: str) -> None:
    backbone = TimmBackbone(name, norm="GN").train()
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    sum(y.mean() for y in backbone(torch.rand(1, 3, 64, 64)).values()).backward()
    assert before and all(torch.equal(b, before[key]) for key, b in backbone.named_buffers())


@pytest.mark.parametrize("shape", [(3, 8), (2, 8, 5)])
def test_frozen_bn_of_linear_layers_stays_as_it_is(shape: tuple[int, ...]) -> None:
    bn = nn.Sequential(nn.BatchNorm1d(8))
    bn[0].running_mean.normal_()
    nn.init.normal_(bn[0].weight)
    x = torch.randn(shape)
    expected = bn.eval()(x)
    freeze_batch_norms(bn, bn.modules())
    torch.testing.assert_close(bn.train()(x), expected)
    assert not any(p.requires_grad for p in bn.parameters())
    before = bn[0].running_mean.clone()
    bn.train()(x)
    assert torch.equal(bn[0].running_mean, before)


def test_bn_keeps_its_activation_and_its_numbers() -> None:
    norms = []
    for norm in ("BN", "FrozenBN"):
        torch.manual_seed(0)
        backbone = TimmBackbone("tf_efficientnet_lite0", norm=norm)
        norms.append(backbone.body.bn1)
    bn, frozen = norms
    assert type(frozen) is FrozenBatchNormAct2d and frozen.eps == bn.eps == 1e-3
    for norm in norms:
        norm.running_mean.copy_(torch.linspace(-1, 1, 32))
        norm.running_var.copy_(torch.linspace(0.5, 2, 32))
    x = torch.randn(2, 32, 8, 8, requires_grad=True) * 5
    torch.testing.assert_close(frozen.train()(x), bn.eval()(x))
    assert frozen(x).max() == 6  # of its ReLU6


@pytest.mark.parametrize(
    "frozen",
    [
        lambda model: timm.layers.freeze_batch_norm_2d(model),
        lambda model: TimmBackbone("regnetx_002"),
    ],
    ids=["timm's", "ours"],
)
def test_inject_convert_and_audit_know_it(frozen: object) -> None:
    model = frozen(timm.create_model("regnetx_002", features_only=True))
    audit = str(gn_det.audit(model))
    assert "FrozenBatchNormAct2d; inject replaces it" in audit
    result = gn_det.convert_bn(model, [torch.rand(2, 3, 64, 64)])
    assert not result.not_reached
    kinds = {type(module).__name__ for module in model.modules()}
    assert not [kind for kind in kinds if "BatchNorm" in kind]
