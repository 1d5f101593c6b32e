"""What is done to a model before it trains."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import ResNet
from detectron2.modeling.backbone.resnet import BasicStem
from support.programs import ROOT
from torch import Tensor, nn

from gn_det import FusedGroupNorm, InputError, audit, fuse
from gn_det.config import load_config
from gn_det.engine.trainer import _precise_bn, build_model, prepare_model
from gn_det.layers import WeightStandardized
from gn_det.layers.detectron2.roi_align import ExactROIAlign
from gn_det.layers.recomputation import recomputes_in


class Model(nn.Module):
    """A backbone and the sum of what it finds."""

    def __init__(self) -> None:
        super().__init__()
        stages = [ResNet.make_default_stages(18, norm=FusedGroupNorm)[0]]
        self.backbone = fuse(ResNet(BasicStem(norm=FusedGroupNorm), stages, out_features=["res2"]))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images)["res2"].square().mean()


def computed(model: nn.Module) -> list[Tensor]:
    images = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(images)
    loss.backward()
    return [loss, *(p.grad for p in model.parameters())]


@pytest.mark.slow
def test_a_compiled_backbone_computes_the_same_under_the_same_names() -> None:
    torch.manual_seed(0)
    model = Model()
    expected, names = computed(model), list(model.state_dict())
    prepare_model(model, channels_last=False, compile_backbone=True)
    assert list(model.state_dict()) == names
    torch._dynamo.utils.counters.clear()
    for ours, theirs in zip(computed(model), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it did compile


def test_channels_last_is_of_all_convolutions() -> None:
    model = Model()
    prepare_model(model, channels_last=True, compile_backbone=False)
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[-1] > 1]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_detectors_align_regions_by_exact_boxes() -> None:
    cfg = load_config(ROOT / "configs/compare/gn.yaml", ["MODEL.DEVICE", "cpu"])
    poolers = [m for m in build_model(cfg).modules() if isinstance(m, ROIAlign)]
    assert poolers and all(type(pooler) is ExactROIAlign for pooler in poolers)


def test_weight_standardization_that_changes_nothing_is_an_error() -> None:
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.GN.WEIGHT_STANDARDIZATION", "True"]
    with pytest.raises(InputError, match="changes nothing: .* is GeneralizedRCNN, GNGeneral"):
        build_model(load_config(ROOT / "configs/compare/frozenbn.yaml", overrides))
    model = build_model(load_config(ROOT / "configs/compare/gn.yaml", overrides))
    assert any(isinstance(module, WeightStandardized) for module in model.modules())


def test_a_backbone_that_nothing_reads_is_an_error() -> None:
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.GN.BACKBONE", "build_resnet_fpn_backbone"]
    with pytest.raises(
        InputError, match=r"MODEL\.GN\.BACKBONE changes nothing, as MODEL\.BACKBONE"
    ):
        build_model(load_config(ROOT / "configs/compare/gn.yaml", overrides))
    build_model(
        load_config(
            ROOT / "configs/compare/gn.yaml",
            [*overrides, "MODEL.BACKBONE.NAME", "build_gn_backbone"],
        )
    )


def test_recomputation_that_changes_nothing_or_is_compiled_is_an_error() -> None:
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.GN.RECOMPUTE", "True"]
    with pytest.raises(InputError, match="RECOMPUTE changes nothing: .* is GeneralizedRCNN"):
        build_model(load_config(ROOT / "configs/compare/frozenbn.yaml", overrides))
    cfg = load_config(ROOT / "configs/compare/gn.yaml", overrides)
    model = build_model(cfg)
    assert recomputes_in(model)  # as a whole
    assert "GN+ReLU, recomputed" in {row.form for row in audit(model).rows}
    cfg.MODEL.BACKBONE.COMPILE = True
    with pytest.raises(InputError, match=r"GN\.RECOMPUTE and MODEL\.BACKBONE\.COMPILE are both"):
        build_model(cfg)


def test_a_model_without_a_backbone_cannot_have_it_compiled() -> None:
    with pytest.raises(InputError, match="Linear has no backbone to compile"):
        prepare_model(nn.Linear(1, 1), channels_last=False, compile_backbone=True)


def test_precise_bn_without_a_bn_that_trains_is_an_error() -> None:
    cfg = load_config(ROOT / "configs/compare/gn.yaml", ["TEST.PRECISE_BN.ENABLED", "True"])
    with pytest.raises(InputError, match="and no BN of this model trains; set it to False"):
        _precise_bn(cfg, Model())
