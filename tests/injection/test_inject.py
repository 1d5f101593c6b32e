"""inject on components of Detectron2 and on models of others."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from detectron2.layers import (
    Conv2d,
    CycleBatchNormList,
    FrozenBatchNorm2d,
    NaiveSyncBatchNorm,
    ShapeSpec,
)
from detectron2.modeling import build_model
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
)
from support import zoo
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.feature_extraction import create_feature_extractor

from gn_det import FusedGroupNorm, InputError, audit, fuse, inject

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)


def resnet18(norm: str, freeze_at: int = 0) -> ResNet:
    stages = ResNet.make_default_stages(18, norm=norm)
    features = ["res2", "res3", "res4", "res5"]
    return ResNet(BasicStem(norm=norm), stages, out_features=features, freeze_at=freeze_at)


def box_head(*conv_dims: int) -> FastRCNNConvFCHead:
    return FastRCNNConvFCHead(ShapeSpec(16, 7, 7), conv_dims=list(conv_dims), fc_dims=[8])


def mask_head() -> MaskRCNNConvUpsampleHead:
    shape = ShapeSpec(channels=16, width=7, height=7)
    return MaskRCNNConvUpsampleHead(shape, num_classes=2, conv_dims=[32, 32])


def retinanet_head(norm: str, num_convs: int = 4) -> RetinaNetHead:
    return RetinaNetHead(
        input_shape=[ShapeSpec(channels=64)] * 2,
        num_classes=3,
        num_anchors=2,
        conv_dims=[64] * num_convs,
        norm=norm,
    )


def norms(model: nn.Module) -> list[FusedGroupNorm]:
    return [m for m in model.modules() if isinstance(m, FusedGroupNorm)]


@pytest.mark.parametrize("norm", ["FrozenBN", "BN", "SyncBN", "naiveSyncBN", "GN", "LN", ""])
def test_every_norm_of_a_resnet_becomes_gn(norm: str) -> None:
    model = inject(resnet18(norm))
    assert len(norms(model)) == 20  # stem, 2 convolutions in 8 blocks, 3 shortcuts
    assert not any(isinstance(m, BATCH_NORMS) or type(m) is nn.GroupNorm for m in model.modules())
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
    head = inject(box_head(32, 32))
    assert head.conv1.bias is None and isinstance(head.conv2.norm, FusedGroupNorm)
    assert [name for name, _ in head.named_parameters()][:3] == [
        "conv1.weight",
        "conv1.norm.weight",
        "conv1.norm.bias",
    ]


def test_a_convolution_keeps_its_bias_where_detectron2_has_no_norm() -> None:
    rpn = inject(StandardRPNHead(in_channels=64, num_anchors=3), "rpn")
    assert rpn.conv.bias is not None and isinstance(rpn.conv.norm, FusedGroupNorm)
    top = inject(LastLevelP6P7(64, 64), "fpn.top_block")
    assert top.p6.bias is not None and isinstance(top.p7.norm, FusedGroupNorm)


def test_an_rpn_head_of_several_convolutions_gets_as_many_norms() -> None:
    rpn = inject(StandardRPNHead(in_channels=64, num_anchors=3, conv_dims=[-1, 48]), "rpn")
    assert [n.num_groups for n in norms(rpn)] == [32, 24]
    logits, _ = rpn([torch.randn(1, 64, 5, 5)])
    assert logits[0].shape == (1, 3, 5, 5)


def test_a_keypoint_head_gets_norms_behind_its_convolutions_and_none_behind_its_scores() -> None:
    head = KRCNNConvDeconvUpsampleHead(ShapeSpec(channels=16), num_keypoints=3, conv_dims=(32, 32))
    names = list(inject(head, "keypoint_head").state_dict())
    assert "conv_fcn2.norm.weight" in names and "score_lowres.norm.weight" not in names


def test_frozen_stages_stay_frozen() -> None:
    model = inject(resnet18("GN", freeze_at=2))
    frozen = [n for n in norms(model) if not n.weight.requires_grad and not n.bias.requires_grad]
    assert len(frozen) == 5  # the stem and res2


def test_fpn_reaches_its_backbone_too() -> None:
    model = inject(FPN(resnet18("FrozenBN"), ["res2", "res3", "res4", "res5"], 48))
    assert len(norms(model)) == 20 + 8
    assert model.fpn_lateral2.norm.num_groups == 24  # 48 channels
    assert model.fpn_lateral2.bias is None


def test_sites_choose_the_parts() -> None:
    model = FPN(resnet18("FrozenBN"), ["res2", "res3", "res4", "res5"], 48)
    inject(model, "fpn")
    assert len(norms(model)) == 8
    assert isinstance(model.bottom_up.stem.conv1.norm, FrozenBatchNorm2d)


def test_default_and_more_sites_go_together() -> None:
    head = inject(mask_head(), ["default", "mask_head.deconv"])
    assert [name for name, m in head.named_modules() if isinstance(m, FusedGroupNorm)] == [
        "mask_fcn1.norm",
        "deconv.norm",
    ]
    assert head.deconv.bias is not None
    assert head.layers(torch.randn(2, 16, 7, 7)).shape == (2, 2, 14, 14)


def test_num_groups_is_a_limit_where_channels_do_not_divide() -> None:
    assert [n.num_groups for n in norms(inject(box_head(64, 36), num_groups=8))] == [8, 6]


def test_channels_per_group_counts_the_other_way() -> None:
    found = norms(inject(box_head(64, 36, 7), channels_per_group=16))
    assert [(n.num_channels, n.num_groups) for n in found] == [(64, 4), (36, 3), (7, 1)]


def test_gn_keeps_its_groups_and_eps_unless_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 48, 1), nn.GroupNorm(3, 48, eps=1e-3))
    kept, told = inject(copy.deepcopy(model)), inject(model, num_groups=16)
    assert (kept[1].num_groups, kept[1].eps) == (3, 1e-3)
    assert (told[1].num_groups, told[1].eps) == (16, 1e-3)


@pytest.mark.parametrize("kind", [nn.GroupNorm, nn.BatchNorm2d])
def test_a_norm_without_bias_gains_none_if_it_was_gn(kind: type[nn.Module]) -> None:
    norm = nn.GroupNorm(1, 8) if kind is nn.GroupNorm else nn.BatchNorm2d(8)
    nn.init.normal_(norm.weight)
    norm.bias = None
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    expected = model(x)
    fused = fuse(inject(model))
    has_bias = isinstance(norm, nn.BatchNorm2d)
    assert ("1.bias" in fused.state_dict()) == has_bias
    assert fused[1].weight is norm.weight
    if not has_bias:
        torch.testing.assert_close(fused(x), expected)
    fused(x).sum().backward()
    assert str(audit(fused))


def test_both_ways_to_count_groups_are_refused() -> None:
    with pytest.raises(InputError, match=r"num_groups 8 and channels_per_group 4"):
        inject(box_head(64), num_groups=8, channels_per_group=4)
    with pytest.raises(ValueError, match="at least 1"):
        inject(box_head(64), num_groups=0)


def test_device_dtype_and_mode_follow_the_convolution() -> None:
    model = inject(resnet18("BN").to(torch.float64).eval())
    assert all(n.weight.dtype == torch.float64 and not n.training for n in norms(model))
    assert all(n.weight.device.type == "meta" for n in norms(inject(resnet18("BN").to("meta"))))


def test_injecting_twice_is_injecting_once() -> None:
    once = inject(resnet18("BN"), num_groups=16)
    names = list(once.state_dict())
    assert list(inject(once).state_dict()) == names
    assert {n.num_groups for n in norms(once)} == {16}


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("box_head", r"the model \(FastRCNNConvFCHead\).*set MODEL\.ROI_BOX_HEAD\.NUM_CONV"),
        ("rpn", r"site rpn: FastRCNNConvFCHead has none"),
        ("boxhead", r"no site 'boxhead'; did you mean box_head\?"),
        ("default", r"nothing to normalize at default.*NUM_CONV"),
    ],
)
def test_a_site_where_nothing_would_change_is_refused(site: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        inject(box_head(), site)


def test_a_refused_site_says_what_there_is_and_changes_nothing() -> None:
    model = FPN(resnet18("BN"), ["res2", "res3", "res4", "res5"], 32)
    with pytest.raises(InputError, match=r"backbone 20, fpn 8"):
        inject(model, ["backbone", "mask_head"])
    assert not norms(model)


def test_no_site_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no sites"):
        inject(resnet18("BN"), [])


class TestTowers:
    """Where norms come between the modules of an nn.Sequential."""

    def test_keys_are_those_of_detectron2s_own_norm(self) -> None:
        ours, theirs = inject(retinanet_head("")), retinanet_head("GN")
        assert list(ours.state_dict()) == list(theirs.state_dict())
        ours.load_state_dict(theirs.state_dict())
        x = [torch.randn(1, 64, 6, 7), torch.randn(1, 64, 3, 4)]
        for mine, other in zip(ours(x), theirs(x), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))

    @pytest.mark.parametrize("num_convs", [1, 2, 4])
    def test_weights_from_before_load(self, num_convs: int) -> None:
        before = retinanet_head("", num_convs)
        after = inject(retinanet_head("", num_convs))
        missing, unexpected = after.load_state_dict(before.state_dict(), strict=False)
        assert not unexpected
        ours = {id(n) for n in norms(after)}
        of_norms = {
            f"{name}.{key}"
            for name, m in after.named_modules()
            if id(m) in ours
            for key in ("weight", "bias")
        }
        assert set(missing) == of_norms
        for tower in ("cls_subnet", "bbox_subnet"):
            convs = [m for m in getattr(before, tower) if isinstance(m, nn.Conv2d)]
            moved = [m for m in getattr(after, tower) if isinstance(m, nn.Conv2d)]
            for old, new in zip(convs, moved, strict=True):
                assert torch.equal(old.weight, new.weight) and torch.equal(old.bias, new.bias)

    def test_weights_that_lost_what_stood_where_a_norm_is_are_refused(self) -> None:
        weights = retinanet_head("").state_dict()
        del weights["cls_subnet.4.weight"]  # as Detectron2's checkpointer does: the shape differs
        with pytest.raises(RuntimeError, match=r"cls_subnet\.4\.weight.*Checkpointer"):
            inject(retinanet_head("")).load_state_dict(weights, strict=False)

    def test_weights_of_other_parts_are_left_alone(self) -> None:
        head = inject(retinanet_head(""))
        missing, unexpected = head.load_state_dict({}, strict=False)
        assert len(missing) == len(head.state_dict()) and not unexpected

    def test_batch_norms_of_each_level_become_one_gn(self) -> None:
        head = retinanet_head("BN")
        assert any(isinstance(m, CycleBatchNormList) for m in head.modules())
        inject(head)
        assert not any(isinstance(m, BATCH_NORMS) for m in head.modules())
        assert list(head.state_dict()) == list(retinanet_head("GN").state_dict())


class TestOthers:
    """Models of no library that sites know: norms are found by type."""

    def test_norms_of_every_kind_are_found_wherever_they_are(self) -> None:
        model = nn.ModuleDict(
            {
                "a": nn.Sequential(nn.Conv1d(3, 48, 1), nn.BatchNorm1d(48)),
                "b": nn.Sequential(nn.Conv3d(3, 64, 1), nn.SyncBatchNorm(64)),
                "c": nn.ModuleList([nn.GroupNorm(4, 16), NaiveSyncBatchNorm(8)]),
                "d": torchvision.ops.FrozenBatchNorm2d(12),
                "e": FrozenBatchNorm2d(24),
            }
        )
        inject(model)
        assert [n.num_channels for n in norms(model)] == [48, 64, 16, 8, 12, 24]
        assert len(audit(model).rows) == 6

    def test_layer_and_instance_norms_stay_and_are_told(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(8), nn.LayerNorm(8), nn.InstanceNorm2d(8))
        inject(model)
        assert [type(m) for m in model][1:] == [nn.LayerNorm, nn.InstanceNorm2d]
        assert {left.modules for left in audit(model).left_alone} == {("1",), ("2",)}

    def test_frozen_batch_norm_becomes_trainable_behind_a_trainable_convolution_only(self) -> None:
        def block(trains: bool) -> nn.Sequential:
            conv = nn.Conv2d(3, 32, 1).requires_grad_(trains)
            return nn.Sequential(conv, torchvision.ops.FrozenBatchNorm2d(32))

        model = inject(nn.Sequential(block(True), block(False)))
        assert [n.weight.requires_grad for n in norms(model)] == [True, False]

    def test_a_norm_that_a_convolution_holds_is_frozen_with_it(self) -> None:
        conv = Conv2d(3, 32, 1, norm=FrozenBatchNorm2d(32)).requires_grad_(False)
        model = inject(nn.ModuleList([conv, Conv2d(3, 32, 1, norm=FrozenBatchNorm2d(32))]))
        assert [n.weight.requires_grad for n in norms(model)] == [False, True]

    def test_a_norm_without_parameters_becomes_one_without(self) -> None:
        model = inject(nn.Sequential(nn.Conv2d(3, 32, 1), nn.BatchNorm2d(32, affine=False)))
        assert model[1].weight is None and len(model.state_dict()) == 2

    def test_a_norm_with_nothing_but_a_size_is_replaced(self) -> None:
        bare = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        assert inject(nn.Sequential(bare, nn.BatchNorm2d(8, affine=False)))[0].num_groups == 8

    def test_a_norm_that_modules_share_stays_one(self) -> None:
        shared = nn.BatchNorm2d(8)
        model = nn.ModuleList([nn.Sequential(shared), nn.Sequential(nn.ReLU(), shared, shared)])
        inject(model)
        assert model[0][0] is model[1][1] is model[1][2]
        assert len(norms(model)) == 1 and not any(m is shared for m in model.modules())

    def test_timms_norms_keep_the_dropout_and_the_activation_that_they_hold(self) -> None:
        relu, silu = (
            BatchNormAct2d(64),
            BatchNormAct2d(64, act_layer=nn.SiLU, drop_layer=nn.Dropout),
        )
        model = inject(nn.Sequential(relu, silu)).eval()
        x = torch.randn(1, 64, 4, 4)
        expected = F.group_norm(x, 32)
        torch.testing.assert_close(model[0](x), F.relu(expected))
        torch.testing.assert_close(model[1](x), F.silu(expected))
        assert model[1].drop is silu.drop and model[0].activation == "relu"

    @pytest.mark.parametrize("name", ["efficientnet_b0", "densenet121", "mobilenetv3_small_050"])
    def test_timms_models_have_no_batch_norm_left(self, name: str) -> None:
        model = timm.create_model(name)
        count = sum(isinstance(m, BATCH_NORMS) for m in model.modules())
        inject(model)
        assert len(norms(model)) == count
        assert not any(isinstance(m, BATCH_NORMS) for m in model.modules())
        assert model(torch.randn(2, 3, 64, 64)).shape == (2, 1000)

    def test_norms_of_a_class_with_its_own_forward_stay_and_are_told(self) -> None:
        class Doubled(nn.GroupNorm):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        model = inject(nn.Sequential(Doubled(4, 8), nn.BatchNorm2d(8)))
        assert type(model[0]) is Doubled and type(model[1]) is FusedGroupNorm
        (left,) = audit(model).left_alone
        assert left.modules == ("0",) and "forward of its own" in left.reason

    def test_a_norm_behind_a_linear_layer_stays_and_is_told(self) -> None:
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Unflatten(1, (8, 1, 1)))
        inject(model.append(nn.BatchNorm2d(8)))
        assert type(model[1]) is nn.BatchNorm1d
        assert "one value" in audit(model).left_alone[0].reason

    def test_convolutions_before_all_norms_do_not_confuse(self) -> None:
        class Block(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv1, self.conv2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
                self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)

        assert [n.num_channels for n in norms(inject(Block()))] == [4, 8]

    def test_hooks_of_a_norm_stay(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        calls = []
        handle = model[1].register_forward_hook(lambda *args: calls.append("forward"))
        model[1].register_full_backward_hook(lambda *args: calls.append("backward"))
        inject(model)
        model(torch.randn(1, 3, 4, 4)).sum().backward()
        assert calls == ["forward", "backward"]
        handle.remove()
        model(torch.randn(1, 3, 4, 4))
        assert len(calls) == 2

    def test_a_trainable_norm_behind_a_frozen_convolution_stays_trainable(self) -> None:
        model = nn.Sequential(nn.Conv2d(3, 8, 1).requires_grad_(False), nn.GroupNorm(4, 8))
        assert inject(model)[1].weight.requires_grad

    def test_a_model_in_ddp_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(DistributedDataParallel, "__init__", nn.Module.__init__)
        wrapped = DistributedDataParallel()
        wrapped.module = nn.Sequential(nn.BatchNorm2d(8))
        with pytest.raises(InputError, match="before DistributedDataParallel"):
            inject(wrapped)

    def test_an_error_leaves_the_model_as_it_was(self) -> None:
        model = nn.Sequential(nn.BatchNorm2d(8), nn.LazyBatchNorm2d())
        with pytest.raises(InputError, match="LazyBatchNorm2d has no channels yet: run the model"):
            inject(model)
        assert type(model[0]) is nn.BatchNorm2d

    def test_torchvisions_feature_extractor_takes_our_layer(self) -> None:
        model = torchvision.models.resnet18(norm_layer=FusedGroupNorm)
        extractor = create_feature_extractor(model, ["layer4"])
        assert extractor(torch.randn(1, 3, 64, 64))["layer4"].shape == (1, 512, 2, 2)

    def test_a_model_without_any_norm_is_refused(self) -> None:
        with pytest.raises(InputError, match="Sequential has no place for a norm"):
            inject(nn.Sequential(nn.Conv2d(3, 8, 1)))


def test_a_block_whose_norm_attribute_is_something_else_is_left_alone() -> None:
    class Block(BasicBlock):
        def __init__(self) -> None:
            super().__init__(64, 64, norm="BN")
            self.norm = "BN"
            self.attention = nn.Module()
            self.attention.norm = nn.LayerNorm(64)

    resnet = ResNet(BasicStem(norm="BN"), [[Block()]], out_features=["res2"])
    resnet.stem.conv1.norm = nn.Identity()
    inject(resnet)
    assert len(norms(resnet)) == 3 and type(resnet.res2[0].attention.norm) is nn.LayerNorm


def test_a_head_that_was_built_in_its_own_way_does_not_stand_in_the_way() -> None:
    class Head(StandardRPNHead):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.cls = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))

    model = nn.ModuleDict({"body": resnet18("BN"), "rpn": Head()})
    inject(model)
    assert len(norms(model)) == 21
    assert audit(model).num_norms == 21


def test_without_a_batch_training_works_where_batch_norm_fails() -> None:
    """One-pixel levels, one picture: BN has one value a channel there."""
    for norm, fails in (("BN", True), ("", False)):
        model = resnet18(norm).train()
        if not norm:
            inject(model)
        x = torch.randn(1, 3, 32, 32)  # res5 is one pixel
        if fails:
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                model(x)
        else:
            model(x)["res5"].sum().backward()
            assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_zoos_gn_models_have_the_keys_of_default_sites() -> None:
    ours = inject(zoo.build("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    gn = zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD"):
        gn.MODEL[part].NORM = "GN"
    assert list(ours.state_dict()) == list(build_model(gn).state_dict())
