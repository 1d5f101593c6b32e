"""Stages of timm's models that do not train."""

from __future__ import annotations

import pytest
import torch
from support.timm_models import BN, of_every_family
from torch import nn

import gn_det
from gn_det import InputError
from gn_det.modeling import TimmBackbone


@of_every_family
@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_frozen_stages_are_those_that_lead_to_their_map(name: str, norm: str) -> None:
    if (name, norm) == ("convnext_atto", "GN"):
        return  # it has LayerNorm alone
    frozen = TimmBackbone(name, norm=norm, freeze_at=2)
    features = frozen(torch.rand(2, 3, 64, 64))
    # Each map of HRNet comes from its last stage.
    hrnet = name.startswith("hrnet")
    assert [y.requires_grad for y in features.values()] == [hrnet, True, True, True]
    fixed = [key for key, parameter in frozen.named_parameters() if not parameter.requires_grad]
    assert fixed
    for bn in (module for module in frozen.modules() if isinstance(module, BN)):
        assert all(parameter.requires_grad for parameter in bn.parameters())
    every = TimmBackbone(name, norm=norm, freeze_at=5)
    assert not any(parameter.requires_grad for parameter in every.parameters())
    assert not any(isinstance(module, BN) for module in every.modules())


@pytest.mark.parametrize(
    ("name", "freeze_at", "out_indices", "trains"),
    [
        ("resnet18", 2, [3], ["layer2", "layer3"]),
        ("resnet18", 5, [3], []),
        pytest.param("selecsls42", 4, (), ["head_0", "head_1"], marks=pytest.mark.slow),
        ("efficientvit_m0", 1, (), ["stages_0", "stages_1"]),
        # timm names their levels by what is no module, and their parts are not in order.
        ("twins_svt_small", 2, (), ["patch_embeds", "blocks", "pos_block"]),
        pytest.param("mvitv2_tiny", 3, (), ["stages"], marks=pytest.mark.slow),
    ],
)
def test_stages_are_frozen_where_the_model_ends_early_or_has_levels_without_modules(
    name: str, freeze_at: int, out_indices: list[int], trains: list[str]
) -> None:
    backbone = TimmBackbone(name, freeze_at=freeze_at, out_indices=out_indices)
    features = backbone(torch.rand(1, 3, 64, 64))
    assert {key: y.requires_grad for key, y in features.items()} == {
        key: shape.stride > 2**freeze_at for key, shape in backbone.output_shape().items()
    }
    found = {
        key.removeprefix("body.").removeprefix("model.").split(".")[0]
        for key, parameter in backbone.named_parameters()
        if parameter.requires_grad
    }
    assert found == set(trains)


# Of BN, which has no gradient of its own where its convolution is frozen and it is not.
@pytest.mark.parametrize(
    ("name", "freeze_at", "frozen", "trains"),
    [
        ("tresnet_m", 1, {"body_conv1"}, {"body_layer1"}),
        ("ghostnet_050", 1, {"conv_stem", "bn1", "blocks_0"}, {"blocks_1"}),
        ("repghostnet_050", 1, {"conv_stem", "bn1", "blocks_0"}, {"blocks_1"}),
        ("xception41p", 2, {"blocks_0.shortcut", "blocks_0.stack"}, {"blocks_1.shortcut"}),
        ("efficientvim_m1", 4, {"model.patch_embed"}, {"model.stages.0.downsample"}),
        ("resnet18", 1, {"conv1", "bn1"}, {"layer1"}),
        ("densenet121", 1, {"features_conv0", "features_norm0"}, {"features_denseblock1"}),
        ("dla46_c", 1, {"base_layer", "level0", "level1"}, {"level2"}),
        ("swin_tiny_patch4_window7_224", 1, {"patch_embed"}, {"layers_0"}),
    ],
)
def test_a_stage_ends_where_its_map_does_and_the_stem_before_stride_4(
    name: str, freeze_at: int, frozen: set[str], trains: set[str]
) -> None:
    backbone = TimmBackbone(name, norm="BN", freeze_at=freeze_at)

    def parameters(parts: set[str]) -> list[nn.Parameter]:
        return [p for part in parts for p in backbone.body.get_submodule(part).parameters()]

    assert not any(parameter.requires_grad for parameter in parameters(frozen))
    assert all(parameter.requires_grad for parameter in parameters(trains)) and parameters(trains)
    for part in frozen:
        assert not any(isinstance(m, BN) for m in backbone.body.get_submodule(part).modules())
    for key, shape in backbone.output_shape().items():
        behind = [p for p in backbone.named_parameters() if p[0] in backbone._behind[key]]
        assert any(p.requires_grad for _, p in behind) == (shape.stride > 2**freeze_at), key


def test_a_stage_below_the_stem_is_none() -> None:
    backbone = TimmBackbone("resnet10t", freeze_at=-1)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("freeze_at", [6, 99, 2.5])
def test_stages_that_are_not_there_cannot_be_frozen(freeze_at: float) -> None:
    with pytest.raises(InputError, match=rf"FREEZE_AT .* is {freeze_at}, and has to be"):
        TimmBackbone("resnet18", freeze_at=freeze_at)


def test_injected_norms_of_frozen_stages_do_not_train() -> None:
    # Of DenseNet, norms come before their convolutions; of ResNet-D, behind a sequence.
    for name in ("densenet121", "resnet18d"):
        backbone = gn_det.inject(TimmBackbone(name, freeze_at=2), "backbone")
        assert not backbone(torch.rand(1, 3, 64, 64))["res2"].requires_grad
        assert gn_det.audit(backbone).rows[0].site == "backbone"
