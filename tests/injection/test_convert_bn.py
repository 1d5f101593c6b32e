"""BN becomes GN with γ, β fitted: exact where GN can be, closest elsewhere, never silent."""

from __future__ import annotations

import copy
import json
from collections import namedtuple
from collections.abc import Callable

import pytest
import timm.layers
import torch
import torchvision
from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import zoo
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured
from torch.testing import assert_close

from gn_det import FusedGroupNorm, InputError, audit, inject
from gn_det.injection import convert_bn
from gn_det.injection.convert_bn import Calibration


def trained(model: nn.Module, seed: int = 0) -> nn.Module:
    """With norms as training leaves them: γ, β and running statistics of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -1.0, 1.0),
                ("running_mean", -0.5, 0.5),
                ("running_var", 0.5, 2.0),
            ):
                tensor = getattr(module, name)
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def shuffled_pictures(seed: int, channels: int) -> list[Tensor]:
    """Pictures with the same values at other places, so of the same statistics behind 1×1."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(channels, 36, generator=generator)

    def picture() -> Tensor:
        return pixels[:, torch.randperm(36, generator=generator)].view(channels, 6, 6)

    return [torch.stack([picture(), picture()]) for _ in range(2)]


def bottom(model: nn.Module, batches: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(batch) for batch in batches])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), channels=st.sampled_from([2, 6, 8]), depth=st.integers(1, 8))
def test_instance_norm_takes_over_any_bn_where_pictures_have_the_same_statistics(
    seed: int, channels: int, depth: int
) -> None:
    torch.manual_seed(seed)
    layers = []
    for _ in range(depth):
        layers += [nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels), nn.Tanh()]
    model = trained(nn.Sequential(*layers), seed)
    batches = shuffled_pictures(seed, channels)
    expected = bottom(model, batches)
    found = convert_bn(model, batches, channels_per_group=1)
    assert found.copied > 0.05
    # Errors are relative, and rounding errors alone where the outputs of BN hardly vary.
    assume(found.copied < 1e4)
    # Behind several layers, as near as passes go on.
    bound = 1e-4 if depth == 1 else 5e-3
    assert max(row.calibrated for row in found.rows) < bound
    assert_close(bottom(model, batches), expected, atol=10 * bound, rtol=0)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), groups=st.sampled_from([1, 2, 4]))
def test_groups_whose_channels_share_statistics_are_recovered(seed: int, groups: int) -> None:
    torch.manual_seed(seed)
    bn = trained(nn.BatchNorm2d(8), seed)
    for name in ("running_mean", "running_var"):  # one value for each group
        shared = getattr(bn, name).view(groups, -1)
        shared.copy_(shared[:, :1].expand_as(shared).clone())
    model = nn.Sequential(bn).eval()
    # Pictures that are alike in mean and deviation of each group, and in nothing else.
    batches = [3 * nn.functional.group_norm(torch.randn(2, 8, 5, 5), groups) + 1 for _ in range(3)]
    expected = bottom(model, batches)
    (row,) = convert_bn(model, batches, num_groups=groups).rows
    assert row.num_groups == groups and row.copied > 0.05 and row.calibrated < 1e-4
    assert_close(bottom(model, batches), expected, atol=1e-4, rtol=1e-4)


def detectron2_resnet(depth: int, norm: str | Callable = "BN") -> ResNet:
    stages = ResNet.make_default_stages(depth, norm=norm)
    return ResNet(BasicStem(norm=norm), stages, out_features=["res5"])


def settled(model: nn.Module, batches: list[Tensor]) -> nn.Module:
    """With running statistics of what it sees."""
    model.train()
    for _ in range(20):
        for batch in batches:
            model(batch)
    return model.eval()


@pytest.mark.parametrize(
    ("build", "norms"),
    [
        (lambda: detectron2_resnet(18), 20),
        pytest.param(lambda: detectron2_resnet(50), 53, marks=pytest.mark.slow),
        pytest.param(lambda: torchvision.models.resnet18(weights=None), 20, marks=pytest.mark.slow),
        pytest.param(
            lambda: timm.create_model("resnet18", num_classes=3), 20, marks=pytest.mark.slow
        ),
    ],
    ids=["detectron2-18", "detectron2-50", "torchvision-18", "timm-18"],
)
def test_resnets_keep_convolutions_and_get_closer_to_bn(build: Callable, norms: int) -> None:
    batches = [10 * torch.rand(4, 1, 1, 1) * torch.randn(4, 3, 64, 64) for _ in range(2)]
    model = settled(build(), batches)
    keys = inject(copy.deepcopy(model)).state_dict().keys()
    convs = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    weights = {name: conv.weight.clone() for name, conv in convs.items()}
    found = convert_bn(model, batches)
    assert len(found.rows) == norms and not found.not_reached
    assert all(isinstance(model.get_submodule(row.name), FusedGroupNorm) for row in found.rows)
    assert found.calibrated < 0.95 * found.copied
    assert found.rows[0].calibrated <= found.rows[0].copied  # both have the same input
    assert model.state_dict().keys() == keys
    for name, conv in convs.items():
        assert model.get_submodule(name) is conv and torch.equal(conv.weight, weights[name])


@pytest.mark.parametrize("groups", [1, 8])
def test_deep_networks_take_few_passes(groups: int) -> None:
    torch.manual_seed(0)
    layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(24)]
    model = trained(nn.Sequential(*(layer for three in layers for layer in three)))
    batches = [torch.randn(2, 8, 8, 8) for _ in range(3)]
    found = convert_bn(model, batches, num_groups=groups)
    assert found.passes <= 8 and found.calibrated < 0.8 * found.copied


class Two(nn.Module):
    """A convolution and a norm, called once for each level."""

    def __init__(self, norm: nn.Module, calls: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = norm
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.norm(self.conv(x * level)) for level in range(1, self.calls + 1))


def pictures() -> list[Tensor]:
    return [torch.randn(2, 3, 5, 5), 3 * torch.randn(1, 3, 4, 7)]


KINDS = {
    "BN": lambda: nn.BatchNorm2d(8),
    "SyncBN": lambda: nn.SyncBatchNorm(8),
    "Detectron2's SyncBN": lambda: NaiveSyncBatchNorm(8),
    "Detectron2's FrozenBN": lambda: FrozenBatchNorm2d(8),
    "torchvision's FrozenBN": lambda: torchvision.ops.FrozenBatchNorm2d(8),
    "timm's": lambda: timm.layers.BatchNormAct2d(8, act_layer=nn.SiLU),
    "timm's with parameters": lambda: timm.layers.BatchNormAct2d(8, act_layer=nn.PReLU),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_bn_is_fitted_before_its_activation(kind: str) -> None:
    model = trained(Two(KINDS[kind]()))
    batches = pictures()
    bn = copy.deepcopy(model.norm)
    xs = [model.conv(batch).detach() for batch in batches]
    ys = [
        nn.functional.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
        for x in xs
    ]
    (row,) = convert_bn(model, batches, num_groups=2).rows
    norm = model.norm
    flat = [torch.cat([t.movedim(1, 0).flatten(1) for t in each], 1) for each in (
        [nn.functional.group_norm(x, 2) for x in xs], ys
    )]  # fmt: skip
    for c in range(8):
        columns = torch.stack([flat[0][c], torch.ones_like(flat[0][c])], 1).double()
        expected = torch.linalg.lstsq(columns, flat[1][c, :, None].double()).solution[:, 0]
        assert_close(torch.stack([norm.weight[c], norm.bias[c]]).double(), expected,
                     atol=1e-4, rtol=1e-4)  # fmt: skip
    distance = (norm.weight[:, None] * flat[0] + norm.bias[:, None] - flat[1]).norm()
    spread = (flat[1] - flat[1].mean(1, keepdim=True)).norm()
    assert row.calibrated == pytest.approx((distance / spread).item(), rel=1e-4)


def test_a_norm_that_is_called_several_times_is_fitted_to_all_of_them() -> None:
    once, thrice = (trained(Two(nn.BatchNorm2d(8), calls)) for calls in (1, 3))
    batches = pictures()
    values = [convert_bn(model, batches).rows[0].values for model in (once, thrice)]
    assert values == [2 * 25 + 28, 3 * (2 * 25 + 28)]
    assert not torch.allclose(once.norm.weight, thrice.norm.weight)


def test_bn_that_cycles_over_levels_is_fitted_to_the_statistics_of_each() -> None:
    torch.manual_seed(0)
    model = Two(CycleBatchNormList(2, num_features=8), calls=2)
    trained(model)
    model.norm.weight.data.uniform_(0.5, 1.5)
    outputs: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda _, args, y: outputs.append(y.detach()))
    batches = pictures()[:1]
    bottom(model, batches)
    handle.remove()
    xs = [model.conv(batches[0] * level).detach() for level in (1, 2)]
    x_hat = torch.cat([nn.functional.group_norm(x, 8)[:, 0].flatten() for x in xs])
    columns = torch.stack([x_hat, torch.ones_like(x_hat)], 1)
    y = torch.cat([y[:, 0].flatten() for y in outputs])
    expected = torch.linalg.lstsq(columns, y[:, None]).solution[:, 0]
    convert_bn(model, batches)
    found = torch.stack([model.norm.weight[0], model.norm.bias[0]])
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_what_trains_is_as_inject_leaves_it_and_no_gradients_are_left() -> None:
    model = nn.Sequential(*(trained(Two(nn.BatchNorm2d(8))) for _ in range(1)))
    frozen = detectron2_resnet(18)
    frozen.freeze(2)
    expected = inject(copy.deepcopy(frozen))
    convert_bn(frozen, [torch.randn(2, 3, 64, 64)])
    for (name, ours), (_, theirs) in zip(
        frozen.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert ours.requires_grad == theirs.requires_grad and ours.grad is None, name
    assert not frozen.res2[0].conv1.norm.weight.requires_grad
    assert frozen.res3[0].conv1.norm.weight.requires_grad
    model.train()
    model[0].conv.eval()
    convert_bn(model, pictures())
    assert [m.training for m in (model, model[0].conv, model[0].norm)] == [True, False, True]


def test_dead_and_constant_channels_give_what_bn_gave() -> None:
    model = trained(Two(nn.BatchNorm2d(8)))
    with torch.no_grad():
        model.conv.weight[0] = 0  # the channel is its bias everywhere
        model.conv.bias[0] = 2.0
        model.norm.weight[1] = 0  # BN puts out β
    gamma = model.norm.weight[0].item()
    batches = pictures()
    expected = bottom(model, batches[:1])
    (row,) = convert_bn(model, batches, channels_per_group=1).rows
    assert row.constant_channels == 1
    assert model.norm.weight[0].item() == pytest.approx(gamma)
    assert_close(bottom(model, batches[:1])[:, :2], expected[:, :2], atol=1e-5, rtol=1e-5)


def test_norms_that_are_not_reached_are_told_and_keep_the_bns_parameters() -> None:
    model = trained(nn.ModuleDict({"a": Two(nn.BatchNorm2d(8)), "b": Two(nn.BatchNorm2d(8))}))
    before = model["a"].norm.weight.clone(), model["a"].norm.bias.clone()
    found = convert_bn(model, pictures(), lambda model, batch: model["b"](batch))
    assert found.not_reached == ("a.norm",) and [r.name for r in found.rows] == ["b.norm", "a.norm"]
    assert isinstance(model["a"].norm, FusedGroupNorm)
    assert_close((model["a"].norm.weight, model["a"].norm.bias), before)
    assert "Not reached by the calibration set, γ and β of the BN kept: a.norm" in str(found)
    assert found.rows[1].values == 0 and found.rows[1].calibrated is None


def test_norms_without_parameters_are_converted_and_told() -> None:
    model = trained(Two(nn.BatchNorm2d(8, affine=False)))
    (row,) = convert_bn(model, pictures()).rows
    assert model.norm.weight is None and row.copied == row.calibrated > 0


def test_bn_without_bias_becomes_gn_with_one() -> None:
    model = trained(Two(nn.BatchNorm2d(8)))
    model.norm.bias = None
    (row,) = convert_bn(model, pictures(), channels_per_group=1).rows
    assert row.calibrated < row.copied and model.norm.bias.abs().max() > 0


def test_empty_inputs_count_for_nothing() -> None:
    batches = pictures()
    one, other = (trained(Two(nn.BatchNorm2d(8))) for _ in range(2))
    other.load_state_dict(one.state_dict())
    convert_bn(one, batches)
    convert_bn(other, [*batches, torch.zeros(0, 3, 5, 5)])
    assert_close(one.norm.weight, other.norm.weight)


class Wandering(Two):
    """Takes as many rows as its result says, as detectors take boxes."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        return self.norm(y[:, :, : 1 + int(y.abs().sum()) % 4])


def normless() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8))


def mixed() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))


def part_without() -> nn.Module:
    resnet = detectron2_resnet(18)
    resnet.stem.conv1.norm = None
    return resnet


def pruned() -> nn.Module:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    l1_unstructured(model[0], "weight", 0.5)
    return model


class AsksForMomentum(Two):
    def forward(self, x: Tensor) -> Tensor:
        assert self.norm.momentum == 0.1
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (normless, {}, "Sequential has no BN, SyncBN or FrozenBN layer to convert at ALL"),
        (part_without, {}, "site backbone has BN and also a convolution without a norm"),
        (mixed, {"sites": "bakcbone"}, "no site 'bakcbone'; did you mean backbone"),
        (mixed, {"sites": ["backbone"]}, "site backbone: Sequential has none"),
        (lambda: Two(nn.BatchNorm2d(8, track_running_stats=False)), {}, "no running statistics"),
        (pruned, {}, r"Sequential cannot be copied.*prune\.remove"),
        (lambda: AsksForMomentum(nn.BatchNorm2d(8)), {}, "converted model fails .* 'momentum'.*si"),
    ],
)
def test_what_cannot_be_converted_is_an_error(model: Callable, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert_bn(model(), pictures(), **options)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch of the calibration set reaches a norm"),
        (iter(pictures()), "goes through the batches several times, and a list_iterator"),
        ([torch.full((1, 3, 5, 5), float("nan"))], "the input or the output of norm is not finite"),
    ],
)
def test_a_calibration_set_that_tells_nothing_is_an_error_and_changes_nothing(
    batches: object, message: str
) -> None:
    model = trained(Two(nn.BatchNorm2d(8))).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        convert_bn(model, batches)
    assert type(model.norm) is nn.BatchNorm2d and model.norm.training
    assert_close(model.state_dict(), before)
    assert not model.norm._forward_pre_hooks


def test_models_that_go_on_with_other_boxes_are_an_error() -> None:
    torch.manual_seed(3)
    model = Wandering(nn.BatchNorm2d(8))
    model.conv = nn.Conv2d(8, 8, 1)
    batches = [torch.randn(1, 8, 5, 5) for _ in range(8)]
    with pytest.raises(InputError, match="give both models the same intermediate results"):
        convert_bn(trained(model), batches)


class ROIPooler(nn.Module):
    def forward(self, x: Tensor, boxes: list[Tensor]) -> Tensor:
        return torchvision.ops.roi_align(x, boxes, 4)


class TwoStages(nn.Module):
    """Always as many boxes, which depend on the features; a head with BN behind their pooling."""

    def __init__(self, pooler: nn.Module | None, stages: int = 1, head: bool = True) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        self.pooler, self.stages = pooler, stages
        self.head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8) if head else nn.ReLU())

    def forward(self, x: Tensor, boxes: list[Tensor] | None = None) -> None:
        features = self.backbone(x)
        if boxes is None:
            corners = features.prod(1).flatten(1).topk(4).indices.float() % 16
            boxes = [torch.stack([c, c, c + 6, c + 6], 1) for c in corners]
        for _ in range(self.stages):
            pool = self.pooler or (lambda f, b: torchvision.ops.roi_align(f, b, 4))
            offsets = self.head(pool(features, boxes)).mean((1, 2, 3))
            boxes = [each + offsets.mean() for each in boxes]


PICTURES = [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
BOXES = [torch.tensor([[0.0, 0, 9, 9], [3, 3, 20, 20]])] * 2


@pytest.mark.parametrize("pooler", [ROIPooler, None])
def test_as_many_other_boxes_are_not_paired(pooler: type | None) -> None:
    model = trained(TwoStages(pooler and pooler()))
    with pytest.raises(InputError, match=r"(pooler|roi_align) looks at other boxes.*run_on_boxes"):
        convert_bn(model, PICTURES)
    assert type(model.head[1]) is nn.BatchNorm2d


def test_boxes_that_a_call_gives_are_paired_in_every_stage_of_a_cascade() -> None:
    model = trained(TwoStages(ROIPooler(), stages=3))
    found = convert_bn(model, PICTURES, lambda m, x: m(x, BOXES))
    assert [row.name for row in found.rows] == ["backbone.1", "head.1"]


@pytest.mark.parametrize("sites", ["ALL", "head"])
def test_boxes_do_not_matter_where_no_converted_norm_is_on_both_sides(sites: str) -> None:
    model = trained(TwoStages(ROIPooler(), head=sites == "head"))
    assert len(convert_bn(model, PICTURES, sites=sites).rows) == 1


class OldSpec(namedtuple("Base", "channels stride")):
    """A named tuple that takes no positional arguments, as Detectron2's ShapeSpec up to 0.3."""

    def __new__(cls, *, channels: int, stride: int) -> OldSpec:
        return super().__new__(cls, channels, stride)


def test_models_that_hold_what_deepcopy_cannot_copy_are_converted() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    model.shapes = {"res2": [OldSpec(channels=8, stride=4)]}
    model.shapes["all"] = model.shapes
    with pytest.raises(TypeError):
        copy.deepcopy(model)
    assert len(convert_bn(model, PICTURES).rows) == 1


def test_convolutions_without_norms_in_unknown_parts_stay_as_they_are() -> None:
    head = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1))
    model = trained(nn.ModuleDict({"mask_head": head.append(nn.ReLU())}))
    found = convert_bn(model, PICTURES, lambda m, x: m.mask_head(x))
    assert [row.name for row in found.rows] == ["mask_head.1"] and len(head) == 5


def test_gn_beside_bn_stays_as_it_is() -> None:
    model = trained(mixed())
    convert_bn(model, pictures())
    assert [m.num_groups for m in model[1:]] == [8, 2]


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_gn_beside_bn_stays_whatever_groups_are_asked_for(num_groups: int) -> None:
    model = trained(mixed())
    gn = copy.deepcopy(model[2])
    convert_bn(model, pictures(), num_groups=num_groups)
    assert [m.num_groups for m in model[1:]] == [num_groups, 2]
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(model[2](x), gn(x))


def test_heads_with_bn_alone_are_converted_alone() -> None:
    config = zoo.model_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    config.MODEL.ROI_MASK_HEAD.NORM = "BN"
    model = zoo.build_model(config).eval()
    x = torch.randn(2, 256, 14, 14)
    head = model.roi_heads.mask_head
    found = convert_bn(model, [x], lambda m, x: m.roi_heads.mask_head.layers(x), "mask_head")
    assert {row.site for row in found.rows} == {"mask_head"} and len(found.rows) == 4
    assert isinstance(model.backbone.bottom_up.stem.conv1.norm, FrozenBatchNorm2d)
    assert head.mask_fcn1.norm.num_groups == 32


def example() -> Calibration:
    torch.manual_seed(0)
    model = trained(nn.Sequential(Two(nn.BatchNorm2d(8)), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)))
    with torch.no_grad():
        model[0].conv.weight[0] = 0
    return convert_bn(model, pictures(), channels_per_group=1)


def test_the_report_is_a_table_of_a_row_for_each_norm_in_order_of_execution() -> None:
    found = example()
    lines = found.to_markdown().splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "norm", "site", "channels", "groups", "constant", "copied", "calibrated",
    ]  # fmt: skip
    assert lines[2].startswith("| 0.norm") and lines[3].startswith("| 2 ")
    assert lines[4].startswith("| mean") and f"{found.calibrated:.3f}" in lines[4]
    assert "constant: channels whose normalized input does not vary" in str(found)


def test_layers_with_running_statistics_that_stay_are_told() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("running_mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x - self.running_mean[:, None, None]

    model = trained(nn.Sequential(Two(nn.BatchNorm2d(8)), Own(8), Running(), nn.InstanceNorm2d(8)))
    found = convert_bn(model, pictures())
    assert found.not_converted == ("1", "2")
    assert "Not converted, though with running statistics" in str(found)
    assert {"1", "2"} <= {name for each in audit(model).left_alone for name in each.modules}
    assert not example().not_converted and "Not converted" not in str(example())


def test_the_report_as_json_holds_every_number() -> None:
    found = example()
    read = json.loads(found.to_json())
    assert read["calibrated"] == pytest.approx(found.calibrated)
    assert read["passes"] == found.passes
    assert [row["name"] for row in read["rows"]] == ["0.norm", "2"]
    assert read["rows"][0]["copied"] == pytest.approx(found.rows[0].copied)
