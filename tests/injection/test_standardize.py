"""inject with weight_standardization: what it changes, and that fuse and revert keep it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.export.torchscript_patch import patch_instances
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.projects.point_rend import add_pointrend_config
from detectron2.projects.point_rend.point_head import StandardPointHead
from support import zoo
from support.models import computed, randomized, small_fpn
from support.programs import ROOT
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from gn_det import InputError, audit, fuse, inject, revert
from gn_det.config import load_config
from gn_det.layers import FusedGroupNorm, WeightStandardized
from gn_det.layers.detectron2.blocks import D2ConvWS2d, FusedConvWS2d
from gn_det.layers.weight_standardization import ConvWSNorm2d, standardize_weight


def box_head() -> FastRCNNConvFCHead:
    return FastRCNNConvFCHead(ShapeSpec(16, 7, 7), conv_dims=[32, 32], fc_dims=[8])


def mask_head() -> MaskRCNNConvUpsampleHead:
    shape = ShapeSpec(channels=16, width=7, height=7)
    return MaskRCNNConvUpsampleHead(shape, num_classes=2, conv_dims=[32, 32])


def retinanet_head() -> RetinaNetHead:
    return RetinaNetHead(
        input_shape=[ShapeSpec(channels=32)], num_classes=3, num_anchors=2, conv_dims=[32] * 2
    )


def with_ws(model: nn.Module, sites: str = "default") -> nn.Module:
    return randomized(inject(model, sites, weight_standardization=True))


def forms(model: nn.Module) -> dict[str, str]:
    """What each norm of a model computes, by its name."""
    return {name: row.form for row in audit(model).rows for name in row.modules}


def standardized(model: nn.Module) -> int:
    return sum(isinstance(module, WeightStandardized) for module in model.modules())


def assert_computes_the_same(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    for expected, actual in zip(computed(before, x), computed(after, x), strict=True):
        assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def point_head() -> StandardPointHead:
    cfg = get_cfg()
    add_pointrend_config(cfg)
    return StandardPointHead(cfg, ShapeSpec(channels=8))


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (small_fpn, 12 + 8),
        (box_head, 2),
        (retinanet_head, 2 * 2),
        (resnet18, 20),
        (point_head, 3),
        (lambda: nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)), 1),
        (lambda: nn.Sequential(nn.Conv3d(3, 8, 1), nn.BatchNorm3d(8)), 1),
        (lambda: nn.ModuleList([Conv2d(3, 8, 1, norm=nn.BatchNorm2d(8))]), 1),
    ],
)
def test_every_convolution_before_a_norm_standardizes_its_weight(
    build: Callable[[], nn.Module], count: int
) -> None:
    plain, model = inject(build(), "ALL"), with_ws(build(), "ALL")
    assert standardized(model) == count == audit(model).num_norms
    assert list(model.state_dict()) == list(plain.state_dict())
    for module, same in zip(model.modules(), plain.modules(), strict=True):
        assert isinstance(module, type(same))


def test_the_model_is_the_one_of_the_standardized_weights() -> None:
    model, plain = with_ws(small_fpn()), inject(small_fpn())
    x = torch.randn(1, 3, 64, 96)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x)["p2"], plain(x)["p2"], atol=0.1)
    state = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, WeightStandardized):
            state[f"{name}.weight"] = standardize_weight(module.weight)
    plain.load_state_dict(state)
    for name, level in model(x).items():
        assert_close(level, plain(x)[name])


def test_a_plain_convolution_that_gains_a_norm_standardizes_its_weight() -> None:
    block = with_ws(LastLevelP6P7(16, 32), "fpn.top_block")
    assert type(block.p6) is type(block.p7) is ConvWSNorm2d
    assert forms(block) == {"p6.norm": "WS+GN", "p7.norm": "WS+GN"}
    x = torch.randn(1, 16, 8, 8)
    weight, bias = standardize_weight(block.p6.weight), block.p6.bias
    assert_close(block(x)[0], block.p6.norm(F.conv2d(x, weight, bias, stride=2, padding=1)))


BLOCKS = [
    lambda: BasicBlock(32, 32, norm="BN"),
    lambda: BasicBlock(32, 64, stride=2, norm="BN"),
    lambda: BottleneckBlock(32, 32, bottleneck_channels=16, norm="BN"),
    lambda: BottleneckBlock(32, 64, bottleneck_channels=16, stride=2, norm="BN"),
    lambda: Conv2d(32, 32, 3, norm=nn.BatchNorm2d(32), activation=F.relu),
    lambda: nn.Sequential(nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU()),
]


@pytest.mark.parametrize("block", BLOCKS)
def test_fuse_and_revert_compute_the_same(block: Callable[[], nn.Module]) -> None:
    model = with_ws(nn.Sequential(block()))
    count = standardized(model)
    x = torch.randn(2, 32, 6, 7)
    fused = fuse(copy.deepcopy(model))
    assert all("ReLU" in form for name, form in forms(fused).items() if "shortcut" not in name)
    assert all(form.startswith("WS+GN") for form in forms(fused).values())
    assert_computes_the_same(model, fused, x)
    revert(fused)
    assert_computes_the_same(model, fused, x)
    assert standardized(fused) == count
    assert not any(isinstance(module, FusedGroupNorm) for module in fused.modules())
    assert type(fused[0]) is type(model[0])


def test_an_fpn_computes_the_same_fused_and_reverted() -> None:
    model, x = with_ws(small_fpn()), torch.randn(1, 3, 64, 96)
    fused = fuse(copy.deepcopy(model))
    assert forms(fused)["fpn_lateral2.norm"] == "WS+GN+add"
    assert type(fused.fpn_lateral2) is FusedConvWS2d
    assert_computes_the_same(model, fused, x)
    assert_computes_the_same(model, revert(fused), x)
    assert type(fused.fpn_lateral2) is D2ConvWS2d and type(fused) is FPN


def test_a_fused_model_takes_it_too_and_a_second_inject_keeps_it() -> None:
    model = with_ws(small_fpn())
    late = inject(fuse(inject(small_fpn())), weight_standardization=True)
    late.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert_computes_the_same(model, late, x)
    assert_computes_the_same(model, inject(late), x)
    assert_computes_the_same(model, inject(late, weight_standardization=True), x)
    assert standardized(late) == standardized(model)


def test_a_hook_in_a_fused_block_sees_what_it_saw_before() -> None:
    model = with_ws(nn.Sequential(BottleneckBlock(32, 64, bottleneck_channels=16, norm="BN")))
    fused, x = fuse(copy.deepcopy(model)), torch.randn(1, 32, 5, 5)
    seen: list[Tensor] = []
    for each in (model, fused):
        each[0].conv2.norm.register_forward_hook(lambda *args: seen.append(args[-1]))
        each(x)
    assert_close(seen[1], seen[0])


def test_copies_and_pickles_compute_the_same() -> None:
    model, x = fuse(with_ws(small_fpn())), torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_computes_the_same(model, twin, x)


def test_weights_in_channels_last_and_double_precision_compute_the_same() -> None:
    model, x = fuse(with_ws(small_fpn())), torch.randn(1, 3, 64, 64)
    exact = copy.deepcopy(model).double()(x.double())
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)(x)
    for name, level in model(x).items():
        assert exact[name].dtype == torch.float64
        assert_close(level.double(), exact[name], rtol=1e-3, atol=1e-3)
        assert_close(last[name], level, rtol=1e-3, atol=1e-3)


def test_a_model_compiles_without_a_graph_break() -> None:
    model, x = fuse(with_ws(small_fpn())), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_computes_the_same(model, compiled, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [fuse, lambda model: revert(fuse(model))])
def test_a_scripted_model_computes_the_same(change: Callable[[nn.Module], nn.Module]) -> None:
    model, x = change(with_ws(small_fpn())).eval(), torch.randn(1, 3, 64, 64)
    with patch_instances({}):
        scripted = torch.jit.script(model)
    for name, level in model(x).items():
        assert_close(scripted(x)[name], level)


def test_torchvisions_feature_extractor_takes_it() -> None:
    model, x = with_ws(resnet18()), torch.randn(1, 3, 64, 64)
    extractor = create_feature_extractor(model, ["fc"])
    assert_close(extractor(x)["fc"], model(x))


def test_weights_of_a_tower_from_before_it_had_norms_load() -> None:
    before, after = retinanet_head(), with_ws(retinanet_head())
    missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
    assert not unexpected and len(missing) == 2 * 4
    assert torch.equal(after.cls_subnet[3].weight, before.cls_subnet[2].weight)


def test_only_the_convolutions_of_the_named_sites_change() -> None:
    model = small_fpn()
    inject(model, "backbone")
    inject(model, "fpn", weight_standardization=True)
    assert standardized(model) == 8 and standardized(model.bottom_up) == 0
    assert {form[:3] for name, form in forms(model).items() if "fpn" in name} == {"WS+"}
    assert {form for name, form in forms(model).items() if "bottom_up" in name} == {"GN"}
    assert not audit(model).left_alone


def test_the_audit_tells_which_convolutions_were_left() -> None:
    head = with_ws(mask_head(), "ALL")
    assert forms(head) == {"mask_fcn1.norm": "WS+GN", "deconv.norm": "GN"}
    left, predictor = audit(head).left_alone
    assert left.modules == ("deconv",) and predictor.modules == ("predictor",)
    assert left.reason == "ConvTransposeNorm2d, whose weight is not standardized"
    assert audit(inject(mask_head(), "ALL")).left_alone == (predictor,)


def test_a_deformable_convolution_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.stand_in_for_deform_conv(monkeypatch)
    block = DeformBottleneckBlock(32, 32, bottleneck_channels=16, norm="BN")
    nn.init.normal_(block.conv2_offset.weight, std=0.1)
    model = with_ws(ResNet(BasicStem(3, 32, "BN"), [[block]], out_features=["res2"]))
    left, offset = audit(model).left_alone
    assert left.modules == ("res2.0.conv2",) and left.reason.startswith("DeformConv, whose")
    assert offset.modules == ("res2.0.conv2_offset",) and "sampling points" in offset.reason
    assert standardized(model) == 3 and type(block.conv2_offset) is Conv2d
    x = torch.randn(1, 3, 32, 32)
    fused = fuse(copy.deepcopy(model))
    assert_computes_the_same(model, fused, x)
    assert_computes_the_same(model, revert(fused), x)


def test_a_convolution_of_a_class_with_its_own_forward_stays() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    model = nn.Sequential(Same(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    with_ws(model)
    assert type(model[0]) is Same and isinstance(model[2], WeightStandardized)
    assert "Same, whose" in str(audit(model))


@pytest.mark.parametrize(
    ("build", "site", "message"),
    [
        (mask_head, "mask_head.deconv", r"nothing: mask_head\.deconv has ConvTranspose2d, whose"),
        (
            lambda: nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]),
            "default",
            r"nothing: other has no convolution known before the norm[^;]*$",
        ),
    ],
)
def test_a_switch_that_would_change_nothing_is_refused_and_changes_nothing(
    build: Callable[[], nn.Module], site: str, message: str
) -> None:
    model = build()
    with pytest.raises(InputError, match=message):
        inject(model, site, weight_standardization=True)
    assert not any(isinstance(module, FusedGroupNorm) for module in model.modules())


def test_a_small_mask_rcnn_trains_with_the_switch_of_its_config() -> None:
    config = ROOT / "configs" / "small" / "mask_rcnn_R_18_FPN_gn.yaml"
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.GN.WEIGHT_STANDARDIZATION", "True"]
    torch.manual_seed(0)
    model = build_model(load_config(config, overrides))
    plain = build_model(load_config(config, ["MODEL.DEVICE", "cpu"]))
    assert list(model.state_dict()) == list(plain.state_dict())
    found = audit(model)
    assert found.num_norms == standardized(model) == 20 + 8 + 2 + 2
    assert all(row.form.startswith("WS+GN") for row in found.rows)
    assert "WS+GN+GN+add+ReLU" in str(found) and "WS" not in str(audit(plain))

    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pictures = zoo.pictures()
    losses = []
    for _ in range(3):
        step = zoo.step(model, pictures)
        assert all(torch.isfinite(value).all() for value in step.values())
        losses.append(sum(value.item() for name, value in step.items() if "loss" in name))
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    names = {module: name for name, module in model.named_modules()}
    ours = {f"{names[m]}.weight" for m in model.modules() if isinstance(m, WeightStandardized)}
    assert ours <= moved
