"""fuse and revert: what they keep, and when a block runs unfused."""

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
from detectron2.modeling.backbone import FPN
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BottleneckBlock,
    DeformBottleneckBlock,
)
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from detectron2.solver.build import get_default_optimizer_params
from detectron2.utils.analysis import FlopCountAnalysis
from mmcv.cnn import ConvModule
from support import zoo
from support.models import computed, randomized, small_fpn
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrizations import weight_norm
from torch.testing import assert_close

import gn_det
from gn_det import FusedGroupNorm, InputError, audit, fuse, inject, revert
from gn_det.layers.detectron2.blocks import (
    FusedConv2d,
    FusedDeformBottleneckBlock,
    FusedFPN,
)


def bottleneck(in_channels: int, out_channels: int, **kwargs: object) -> BottleneckBlock:
    block = BottleneckBlock(in_channels, out_channels, bottleneck_channels=16, norm="BN", **kwargs)
    return randomized(inject(nn.Sequential(block))[0])


def fpn(fuse_type: str = "sum") -> FPN:
    return randomized(inject(small_fpn(fuse_type)))


def assert_computes_the_same(before: nn.Module, after: nn.Module, x: Tensor) -> None:
    for expected, actual in zip(computed(before, x), computed(after, x), strict=True):
        assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("block", "forms"),
    [
        (lambda: bottleneck(32, 32), {"GN+ReLU", "GN+add+ReLU"}),
        (lambda: bottleneck(32, 64, stride=2), {"GN+ReLU", "GN+GN+add+ReLU"}),
        (lambda: randomized(inject(nn.Sequential(BasicBlock(32, 32)))[0]), None),
        (lambda: randomized(inject(nn.Sequential(BasicBlock(32, 64, stride=2)))[0]), None),
    ],
)
def test_blocks_compute_the_same(block: Callable[[], nn.Module], forms: set | None) -> None:
    model = nn.Sequential(block())
    fused = fuse(copy.deepcopy(model))
    assert type(fused[0]) is not type(model[0]) and isinstance(fused[0], type(model[0]))
    if forms:
        assert {row.form for row in audit(fused).rows} == forms
    assert_computes_the_same(model, fused, torch.randn(2, 32, 6, 7))
    assert_computes_the_same(model, revert(fused), torch.randn(2, 32, 6, 7))


@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("out_channels", [32, 64])
def test_deformable_blocks_compute_the_same(
    modulated: bool, out_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.stand_in_for_deform_conv(monkeypatch)
    block = DeformBottleneckBlock(
        32, out_channels, bottleneck_channels=16, norm="BN", deform_modulated=modulated
    )
    nn.init.normal_(block.conv2_offset.weight, std=0.1)
    model = randomized(inject(nn.Sequential(block)))
    fused = fuse(copy.deepcopy(model))
    assert type(fused[0]) is FusedDeformBottleneckBlock
    x = torch.randn(2, 32, 6, 7)
    assert_computes_the_same(model, fused, x)
    assert type(fused[0].conv2_offset) is Conv2d
    assert_computes_the_same(model, revert(fused), x)
    assert type(fused[0]) is DeformBottleneckBlock


@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_an_fpn_computes_the_same(fuse_type: str) -> None:
    model = fpn(fuse_type)
    fused = fuse(copy.deepcopy(model))
    assert type(fused) is FusedFPN
    assert [row.form for row in audit(fused).rows if row.site == "fpn"] == ["GN", "GN+add"]
    assert_computes_the_same(model, fused, torch.randn(1, 3, 64, 96))


def test_under_cuda_autocast_every_level_keeps_the_laterals_dtype(
    cuda: torch.device, autocast: None
) -> None:
    with cuda:
        model = fuse(fpn())
    levels = model(torch.empty(1, 3, 64, 96, device=cuda))
    assert {level.dtype for level in levels.values()} == {torch.bfloat16}


def test_a_projection_with_other_groups_than_the_block_keeps_a_call_of_its_own() -> None:
    model = nn.Sequential(bottleneck(32, 64))
    model[0].shortcut.norm = randomized(FusedGroupNorm(64, num_groups=8))
    fused = fuse(copy.deepcopy(model))
    forms = {name: row.form for row in audit(fused).rows for name in row.modules}
    assert forms["0.shortcut.norm"] == "GN" and forms["0.conv3.norm"] == "GN+add+ReLU"
    assert_computes_the_same(model, fused, torch.randn(1, 32, 5, 5))


def test_groups_that_change_after_fuse_are_minded() -> None:
    model = fuse(nn.Sequential(bottleneck(32, 64)))
    model[0].shortcut.norm = randomized(FusedGroupNorm(64, num_groups=8))
    plain = revert(copy.deepcopy(model))
    assert_computes_the_same(plain, model, torch.randn(1, 32, 5, 5))


def test_names_keys_isinstance_and_parameters_are_kept() -> None:
    model = fpn()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    classes = {name: type(module) for name, module in modules.items()}
    fuse(model)
    assert dict(model.named_modules()) == modules
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for name, module in modules.items():
        assert isinstance(module, classes[name])
    revert(model)
    for name, module in modules.items():
        norm = classes[name] is FusedGroupNorm
        assert type(module) is (nn.GroupNorm if norm else classes[name]), name


def test_copies_and_pickles_compute_the_same() -> None:
    model = fuse(fpn())
    x = torch.randn(1, 3, 64, 64)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is FusedFPN
        assert_computes_the_same(model, twin, x)
        # FPN calls its convolutions through plain lists.
        assert twin.lateral_convs[0] is twin.fpn_lateral5


def test_freeze_freezes_a_fused_block() -> None:
    block = fuse(nn.Sequential(bottleneck(32, 32)))[0].freeze()
    assert not any(p.requires_grad for p in block.parameters())
    assert type(block).unfused_kind is BottleneckBlock
    assert isinstance(block.conv1.norm, FusedGroupNorm)


@pytest.mark.parametrize("watched", ["conv1", "conv1.norm", "conv3", "shortcut.norm"])
def test_a_hook_in_a_block_sees_what_it_saw_before(watched: str) -> None:
    model = nn.Sequential(bottleneck(32, 64))
    fused = fuse(copy.deepcopy(model))
    x = torch.randn(1, 32, 5, 5)
    seen: list[Tensor] = []
    for each in (model, fused):
        handle = (
            each[0]
            .get_submodule(watched)
            .register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
        )
        each(x)
        handle.remove()
    assert len(seen) == 2
    assert_close(seen[1], seen[0])


def test_hooks_on_the_block_itself_stay_and_fire() -> None:
    model = nn.Sequential(bottleneck(32, 32))
    calls = []
    model[0].register_forward_hook(lambda *args: calls.append("before fuse"))
    fuse(model)
    model[0].register_full_backward_hook(lambda *args: calls.append("backward"))
    model(torch.randn(1, 32, 5, 5, requires_grad=True)).sum().backward()
    assert calls == ["before fuse", "backward"]


def test_a_hook_on_a_lateral_convolution_sees_its_output_without_the_level_above() -> None:
    model = fuse(fpn())
    seen = []
    model.fpn_lateral2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    features = model.bottom_up(x := torch.randn(1, 3, 64, 64))
    model(x)
    assert_close(seen[0], model.fpn_lateral2.norm(model.fpn_lateral2.convolved(features["res2"])))


def test_a_subclass_with_a_forward_of_its_own_is_fused_by_that() -> None:
    class Block(BottleneckBlock):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    model = inject(nn.Sequential(Block(32, 32, bottleneck_channels=16)))
    x = torch.randn(1, 32, 5, 5)
    expected = model(x)
    assert type(fuse(model)[0]).unfused_kind is Block
    assert {row.form for row in audit(model).rows} == {"GN+ReLU", "GN+add+ReLU"}
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("activation", [F.relu, F.relu_, torch.relu, nn.ReLU(), nn.ReLU(True)])
def test_every_way_to_write_relu_is_taken_in(activation: Callable) -> None:
    conv = Conv2d(3, 32, 1, norm=FusedGroupNorm(32), activation=activation)
    model, x = nn.Sequential(conv), torch.randn(1, 3, 5, 5)
    expected = model(x)
    assert type(fuse(model)[0]) is FusedConv2d
    assert audit(model).rows[0].form == "GN+ReLU"
    assert_close(model(x), expected)


@pytest.mark.parametrize("activation", [nn.GELU(), F.leaky_relu, nn.LeakyReLU()])
def test_other_activations_stay(activation: Callable) -> None:
    conv = Conv2d(3, 32, 1, norm=FusedGroupNorm(32), activation=activation)
    model, x = nn.Sequential(conv), torch.randn(1, 3, 5, 5)
    expected = model(x)
    assert type(fuse(model)[0]) is Conv2d
    assert_close(model(x), expected)


def sequence() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 64, 1), FusedGroupNorm(64), nn.ReLU(), nn.Dropout())


def test_a_norm_takes_in_the_relu_behind_it_in_a_sequential() -> None:
    model = fuse(sequence())
    assert "GN+ReLU" in str(audit(model))
    x = torch.randn(2, 3, 5, 5)
    assert_close(model.eval()(x), sequence().eval()(x))
    revert(model)
    assert type(model) is nn.Sequential and type(model[1]) is nn.GroupNorm


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: model[:2](x),
        lambda model, x: model[2:](model[:2](x)),
        lambda model, x: [x := layer(x) for layer in model][1],
        lambda model, x: model.__setitem__(2, nn.SiLU()) or model(x),
        lambda model, x: model.__setitem__(2, nn.Identity()) or model(x),
        lambda model, x: model.append(nn.Sigmoid())(x),
        lambda model, x: model.__delitem__(2) or model(x),
        lambda model, x: seen_by_a_hook(model[1], model, x),
    ],
    ids=["part", "parts", "layers", "SiLU", "Identity", "more", "less", "hook"],
)
def test_what_is_done_with_parts_of_a_fused_sequential_gives_the_same(change: Callable) -> None:
    x = torch.randn(2, 3, 5, 5)
    expected = change(sequence().eval(), x)
    assert_close(change(fuse(sequence()).eval(), x), expected)


def seen_by_a_hook(norm: nn.Module, model: nn.Module, x: Tensor) -> Tensor:
    seen = []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(x)
    return seen[0]


def test_a_relu_that_stands_in_two_places_stays() -> None:
    relu = nn.ReLU()
    model = nn.Sequential(FusedGroupNorm(32), relu, nn.Conv2d(32, 32, 1), relu).eval()
    x = torch.randn(1, 32, 5, 5)
    expected = model(x)
    fuse(model)
    assert type(relu) is nn.ReLU
    assert_close(model(x), expected)


def test_modules_that_do_not_call_their_children_in_order_stay() -> None:
    class Backwards(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](self[1](x))

    model = Backwards(FusedGroupNorm(32), nn.ReLU())
    fuse(model)
    assert type(model[1]) is nn.ReLU and model[0].activation is None


class PreNorm(nn.Module):
    """A module with a norm that it does not end in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x))


def shared_convolution() -> nn.Module:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            conv = Conv2d(8, 8, 3, padding=1, norm=nn.BatchNorm2d(8))
            self.a, self.b = nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.Sigmoid())

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    return Branches()


def repeated_layer() -> nn.Sequential:
    layer = nn.Conv2d(8, 8, 1)
    return nn.Sequential(layer, nn.GroupNorm(2, 8), layer, nn.ReLU())


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(PreNorm(), nn.ReLU()),
        shared_convolution,
        repeated_layer,
        lambda: nn.Sequential(
            ConvModule(
                8, 8, 1, norm_cfg={"type": "BN"}, act_cfg=None, order=("norm", "conv", "act")
            ),
            nn.ReLU(),
        ),
    ],
)
def test_a_relu_behind_something_else_than_the_norm_stays(build: Callable) -> None:
    model, x = inject(build()), torch.randn(2, 8, 6, 6)
    expected = model(x)
    assert_close(fuse(model)(x), expected)


@pytest.mark.parametrize("how", ["forward", "norm", "global hook"])
def test_what_is_changed_after_fuse_is_minded(how: str) -> None:
    model = nn.Sequential(bottleneck(32, 64))
    fused, x = fuse(copy.deepcopy(model)), torch.randn(2, 32, 5, 5)
    calls: list[int] = []
    handle = None
    for each in (model, fused):
        conv = each[0].conv1
        if how == "forward":
            conv.forward = lambda x, c=conv: calls.append(1) or 2 * type(c).forward(c, x)
        elif how == "norm":
            torch.manual_seed(0)
            conv.norm = nn.BatchNorm2d(16)
    if how == "global hook":
        handle = register_module_forward_hook(lambda *args: calls.append(1))
    expected = model(x)
    before = len(calls)
    assert_close(fused(x), expected)
    assert len(calls) == 2 * before
    if handle:
        handle.remove()


def test_revert_refuses_a_fused_module_that_became_another_class() -> None:
    model = fuse(nn.Sequential(bottleneck(32, 32)))
    weight_norm(model[0].conv1)
    model(torch.randn(1, 32, 5, 5))
    with pytest.raises(InputError, match=r"0\.conv1 is a ParametrizedFusedConv2d"):
        revert(model)


def test_fusing_twice_is_fusing_once_and_reverting_leaves_a_norms_own_activation() -> None:
    model = nn.Sequential(FusedGroupNorm(32, activation="relu"), fuse(fuse(bottleneck(32, 32))))
    x = torch.randn(1, 32, 5, 5)
    expected = model(x)
    revert(model)
    assert model[0].activation == "relu" and type(model[1]) is BottleneckBlock
    assert_close(model(x), expected)


def test_revert_is_another_name_of_unfuse() -> None:
    assert gn_det.revert is gn_det.unfuse


def test_a_model_without_our_norms_is_refused() -> None:
    for change in (fuse, revert):
        with pytest.raises(InputError, match="Sequential has no FusedGroupNorm"):
            change(nn.Sequential(nn.GroupNorm(32, 32), nn.ReLU()))


def heads() -> tuple[nn.Module, nn.Module]:
    box = FastRCNNConvFCHead(ShapeSpec(32, 7, 7), conv_dims=[32, 32], fc_dims=[8])
    shape = ShapeSpec(channels=32, width=7, height=7)
    mask = MaskRCNNConvUpsampleHead(shape, num_classes=2, conv_dims=[32, 32])
    return fuse(inject(box, "ALL")), fuse(inject(mask, "ALL"))


def test_empty_batches_of_regions_train() -> None:
    box, mask = heads()
    empty = torch.zeros(0, 32, 7, 7, requires_grad=True)
    (box(empty).sum() + mask.layers(empty).sum()).backward()
    assert empty.grad.shape == empty.shape
    for name, parameter in [*box.named_parameters(), *mask.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


class TestAsWithGroupNorm:
    """Detectron2's own tools find our norms to be GroupNorms."""

    @pytest.mark.filterwarnings("ignore")
    def test_a_scripted_fpn_computes_the_same(self) -> None:
        model, x = fuse(fpn()).eval(), torch.randn(1, 3, 64, 64)
        with patch_instances({}):
            scripted = torch.jit.script(model)
        for name, level in model(x).items():
            assert_close(scripted(x)[name], level)

    @pytest.mark.filterwarnings("ignore")
    def test_a_traced_backbone_computes_the_same_on_other_sizes(self) -> None:
        model = fuse(fpn()).bottom_up.eval()
        traced = torch.jit.trace(model, torch.randn(1, 3, 64, 64), strict=False)
        x = torch.randn(1, 3, 96, 64)
        assert_close(traced(x)["res5"], model(x)["res5"])

    def test_a_backbone_compiles_without_a_graph_break(self) -> None:
        model, x = fuse(fpn()), torch.randn(1, 3, 64, 64)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for name, level in model(x).items():
            assert_close(compiled(x)[name], level)

    def test_flops_are_those_of_the_plain_model(self) -> None:
        model, x = fuse(fpn()).eval(), torch.randn(1, 3, 64, 64)
        fused = FlopCountAnalysis(model, x).unsupported_ops_warnings(False).by_operator()
        plain = FlopCountAnalysis(revert(model), x).unsupported_ops_warnings(False).by_operator()
        assert fused["conv"] == plain["conv"] > 0
        assert fused["group_norm"] == plain["group_norm"] > 0

    def test_weight_decay_of_norms_is_grouped_alike(self) -> None:
        model = fuse(fpn())
        decays = []
        for each in (model, revert(copy.deepcopy(model))):
            groups = get_default_optimizer_params(each, weight_decay=1e-4, weight_decay_norm=0.0)
            decays.append(
                sorted(
                    (group["weight_decay"], sum(p.numel() for p in group["params"]))
                    for group in groups
                )
            )
        assert decays[0] == decays[1]
        assert decays[0][0] == (0.0, sum(row.parameters for row in audit(model).rows))


@pytest.mark.parametrize("sizes", [[(33, 47)], [(64, 96), (50, 40)]])
def test_pictures_of_any_size_train_and_are_segmented(sizes: list[tuple[int, int]]) -> None:
    cfg = zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    gn = get_cfg()
    gn_det.add_gn_config(gn)
    gn.merge_from_other_cfg(cfg)
    gn.MODEL.META_ARCHITECTURE = "GNGeneralizedRCNN"
    gn.MODEL.GN.SITES = ["ALL"]
    model = build_model(gn)
    pictures = zoo.pictures(*sizes)
    step = zoo.step(model, pictures)
    assert all(torch.isfinite(value).all() for value in step.values())
    assert len([name for name in zoo.detect(model, pictures) if "pred_boxes" in name]) == len(sizes)


def test_a_picture_without_objects_trains() -> None:
    model = fuse(inject(zoo.build("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"), "ALL"))
    pictures = zoo.pictures()
    pictures[0]["instances"] = pictures[0]["instances"][:0]
    step = zoo.step(model, pictures)
    assert all(torch.isfinite(value).all() for value in step.values())
    assert "grad roi_heads.mask_head.deconv.norm.weight" in step
