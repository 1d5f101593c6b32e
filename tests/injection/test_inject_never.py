"""Where inject must put no norm, what it must leave frozen, and which parameters it must keep."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BottleneckBlock, CNNBlockBase
from torch import Tensor, nn
from torch.testing import assert_close

from gn_det import FusedGroupNorm, InputError, audit, convert_bn, fuse, inject


def norms(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, FusedGroupNorm)]


class SqueezeInTheBlock(BottleneckBlock):
    """Detectron2's own way to extend a ResNet: the gate's convolutions have empty norm slots."""

    def __init__(self, in_channels: int, out_channels: int, **options: object) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.down = Conv2d(out_channels, out_channels // 4, 1)
        self.up = Conv2d(out_channels // 4, out_channels, 1)

    def gate(self, y: Tensor) -> Tensor:
        return torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.gate(y)


class NormedSqueezeInTheBlock(SqueezeInTheBlock):
    """The gate has BN of its own."""

    def __init__(self, in_channels: int, out_channels: int, **options: object) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.down.norm = get_norm("BN", self.down.out_channels)


class Squeeze(nn.Module):
    """A gate as a module of its own, with names that the blocks of a ResNet use as well."""

    def __init__(self, channels: int, norm: bool = False) -> None:
        super().__init__()
        self.conv1 = Conv2d(channels, channels // 4, 1)
        self.conv2 = Conv2d(channels // 4, channels, 1)
        if norm:
            self.bn1 = nn.BatchNorm2d(channels // 4)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.adaptive_avg_pool2d(x, 1))
        y = F.relu(self.bn1(y) if self.norm else y)
        return torch.sigmoid(self.conv2(y))


class SqueezeBehindTheBlock(BottleneckBlock):
    def __init__(self, in_channels: int, out_channels: int, **options: object) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.gate = Squeeze(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y * self.gate(y)


class NormedSqueezeBehindTheBlock(SqueezeBehindTheBlock):
    def __init__(self, in_channels: int, out_channels: int, **options: object) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.gate = Squeeze(out_channels, norm=True)


class SequentialSqueeze(SqueezeBehindTheBlock):
    def __init__(self, in_channels: int, out_channels: int, **options: object) -> None:
        super().__init__(in_channels, out_channels, **options)
        narrow = out_channels // 4
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(out_channels, narrow, 1), nn.BatchNorm2d(narrow),
            nn.ReLU(), nn.Conv2d(narrow, out_channels, 1), nn.Sigmoid(),
        )  # fmt: skip


class SplitAttention(nn.Module):
    """Two branches of a convolution, weighed by a softmax that a globally pooled sum decides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = Conv2d(channels, 2 * channels, 3, padding=1, groups=2, bias=False)
        self.bn0 = nn.BatchNorm2d(2 * channels)
        self.fc1, self.bn1 = Conv2d(channels, 32, 1), nn.BatchNorm2d(32)
        self.fc2 = Conv2d(32, 2 * channels, 1)

    def gate(self, branches: Tensor) -> Tensor:
        gap = F.adaptive_avg_pool2d(branches.sum(1), 1)
        weights = self.fc2(F.relu(self.bn1(self.fc1(gap))))
        return weights.view(-1, 2, self.channels, 1, 1).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        branches = F.relu(self.bn0(self.conv(x))).unflatten(1, (2, self.channels))
        return (branches * self.gate(branches)).sum(1)


class SplitAttentionBlock(BottleneckBlock):
    def __init__(self, in_channels: int, out_channels: int, **options: object) -> None:
        super().__init__(in_channels, out_channels, **options)
        self.conv2 = SplitAttention(options["bottleneck_channels"])


# By block: the norms of a block besides those of conv1, conv3 and the shortcut.
GATED = {
    SqueezeInTheBlock: ["conv2.norm"],
    NormedSqueezeInTheBlock: ["conv2.norm"],
    SqueezeBehindTheBlock: ["conv2.norm"],
    NormedSqueezeBehindTheBlock: ["conv2.norm"],
    SequentialSqueeze: ["conv2.norm"],
    SplitAttentionBlock: ["conv2.bn0"],
}


def resnet(block: type[CNNBlockBase], norm: str) -> ResNet:
    torch.manual_seed(0)
    options = {"bottleneck_channels": 16, "norm": norm, "in_channels": 64, "out_channels": 64}
    return ResNet(BasicStem(norm=norm), [[block(**options)]], out_features=["res2"])


@pytest.mark.parametrize("norm", ["BN", "FrozenBN", ""])
@pytest.mark.parametrize("block", GATED)
def test_a_gate_behind_global_pooling_gets_no_norm(block: type[CNNBlockBase], norm: str) -> None:
    model = resnet(block, norm)
    inject(model, "ALL")
    expected = ["conv1.norm", *GATED[block], "conv3.norm"]
    assert sorted(norms(model.res2)) == [f"0.{name}" for name in sorted(expected)]
    without_bn = not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    model.train(without_bn)(torch.rand(1, 3, 64, 64))  # BN has no statistics of one value


@pytest.mark.parametrize("block", GATED)
def test_what_a_gate_says_still_depends_on_the_picture(block: type[CNNBlockBase]) -> None:
    model = inject(resnet(block, "BN")).eval()
    gate = []
    owner = next(m for m in model.modules() if hasattr(m, "gate"))
    if isinstance(owner.gate, nn.Module):
        owner.gate.register_forward_hook(lambda _, __, y: gate.append(y))
    else:
        compute = owner.gate
        owner.gate = lambda y: gate.append(compute(y)) or gate[-1]
    # GN forgets the contrast of a picture, and not where its edges are.
    pictures = torch.rand(3, 3, 64, 64)
    pictures[1, :, :, ::2] = 0
    pictures[2, :, 32:] = 0
    with torch.no_grad():
        model(pictures)
    assert (gate[0][1:] - gate[0][:1]).abs().max() > 1e-3


def test_norms_beside_the_convolutions_of_a_block_are_not_doubled() -> None:
    class Beside(CNNBlockBase):
        def __init__(self) -> None:
            super().__init__(64, 64, 1)
            self.conv1, self.bn1 = Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn1(self.conv1(x)))

    model = ResNet(BasicStem(norm=""), [[Beside()]], out_features=["res2"])
    assert norms(inject(model)) == ["stem.conv1.norm", "res2.0.bn1"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_gate_keeps_its_norm_in_any_dtype_and_dimension(dims: int, dtype: torch.dtype) -> None:
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dims]
    pool = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}[dims]
    gate = nn.Sequential(pool(1), conv(8, 4, 1), norm(4), nn.ReLU(), conv(4, 8, 1), nn.Sigmoid())
    model = nn.Sequential(conv(3, 8, 1), norm(8), gate).to(dtype)
    inject(model)
    assert type(model[1]) is FusedGroupNorm and type(gate[2]) is norm


class PointNet(nn.Module):
    """Norms are declared behind all layers, as in the usual PointNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(3, 64, 1), nn.Conv1d(64, 128, 1)
        self.fc1, self.fc2 = nn.Linear(128, 64), nn.Linear(64, 9)
        self.bn1, self.bn2, self.bn3 = map(nn.BatchNorm1d, (64, 128, 64))


class TimeEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 64, 1), nn.Linear(8, 64)
        self.norm = nn.BatchNorm2d(64)


def test_norms_behind_linear_layers_are_told_by_their_numbers_and_kinds() -> None:
    model = inject(nn.Sequential(PointNet(), TimeEmbedding()))
    kinds = [type(norm) for norm in (model[0].bn1, model[0].bn2, model[0].bn3, model[1].norm)]
    assert kinds == [FusedGroupNorm, FusedGroupNorm, nn.BatchNorm1d, FusedGroupNorm]


class Predictors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Module()
        self.head.tower = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU())
        self.head.bbox_pred = nn.Sequential(nn.Conv2d(64, 36, 3), nn.ReLU())
        self.head.heatmap = nn.Sequential(nn.Conv2d(64, 17, 1), nn.ReLU())


def test_predictors_that_end_in_a_relu_gain_no_norm() -> None:
    model = inject(Predictors())
    assert len(model.head.tower) == 3
    assert len(model.head.bbox_pred) == len(model.head.heatmap) == 2


def test_scripted_parts_and_inference_mode_are_no_stumbling_block() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU()))
    with torch.inference_mode():
        model = inject(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), scripted))
    assert type(model[1]) is FusedGroupNorm and model[2] is scripted


def scripted(block: nn.Module) -> nn.Module:
    return torch.jit.script(block.eval())


def traced(block: nn.Module) -> nn.Module:
    return torch.jit.trace(block.eval(), torch.rand(1, 8, 4, 4))


@pytest.mark.parametrize("recorded", [scripted, traced])
def test_torchscript_stays_and_the_rest_is_fused_and_converted(recorded: Callable) -> None:
    def layers() -> list[nn.Module]:
        return [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]

    model = nn.Sequential(*layers(), recorded(nn.Sequential(*layers())), Calls(layers()))
    x = torch.rand(2, 8, 4, 4)
    left = [row for row in audit(model).left_alone if "TorchScript" in row.reason]
    assert [row.modules for row in left] == [("3",)]
    expected = inject(copy.deepcopy(model), num_groups=2)(x)
    fused = fuse(inject(copy.deepcopy(model), num_groups=2))
    assert audit(fused).rows[0].form == "GN+ReLU"
    assert_close(fused(x), expected)
    assert convert_bn(model, [x], num_groups=1).not_converted == ("3.1",)


class Calls(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


def frozen_bn(x: Tensor, norm: nn.Module) -> Tensor:
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


class ByHelper(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return self.relu(frozen_bn(self.conv(x), self.norm))


class ByAnotherName(Calls):
    def forward(this, x: Tensor) -> Tensor:  # noqa: N805
        return this.frozen(this.conv(x))

    def frozen(this, x: Tensor) -> Tensor:  # noqa: N805
        return F.batch_norm(x, this.norm.running_mean, this.norm.running_var)


@pytest.mark.parametrize("kind", [ByHelper, ByAnotherName])
def test_norms_whose_statistics_the_code_around_them_reads_stay(kind: type) -> None:
    layers = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()]
    model = inject(nn.Sequential(Calls(copy.deepcopy(layers)), kind(layers)))
    assert type(model[0].norm) is FusedGroupNorm and type(model[1].norm) is nn.BatchNorm2d
    (row,) = [row for row in audit(model).left_alone if "1.norm" in row.modules]
    assert row.reason == "BatchNorm2d, whose statistics the code around it reads"
    model(torch.rand(1, 8, 4, 4))


def test_parameters_of_norms_stay_where_convolutions_are_of_another_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1).half(), nn.BatchNorm2d(8))
    weight = model[1].weight
    assert inject(model)[1].weight is weight


def test_a_plain_model_keeps_the_norm_of_a_gate() -> None:
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 1), nn.Hardsigmoid(),
    )  # fmt: skip
    model = inject(nn.ModuleList([nn.BatchNorm2d(8), gate]))
    assert norms(model) == ["0"]


def test_a_pooled_branch_that_is_no_gate_gets_its_norm() -> None:
    """As the image pooling of DeepLab, where a group has several channels."""
    branch = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 64, 1), nn.BatchNorm2d(64))
    assert norms(inject(branch)) == ["2"]
    assert branch(torch.randn(1, 8, 5, 5)).shape == (1, 64, 1, 1)


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("training", [True, False])
def test_a_group_of_one_value_is_an_error_that_names_the_module(
    pictures: int, training: bool
) -> None:
    body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16))
    model = inject(nn.ModuleDict({"body": body})).train(training)
    with pytest.raises(InputError, match=r"^body\.2: each of 16 groups is one value"):
        model.body(torch.randn(pictures, 8, 5, 5))
    assert model.body(torch.randn(0, 8, 5, 5)).shape == (0, 16, 1, 1)
    inject(model, channels_per_group=2)
    assert model.body(torch.randn(pictures, 8, 5, 5)).shape == (pictures, 16, 1, 1)


def hooks_run_once() -> nn.Module:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
    return nn.Sequential(nn.BatchNorm2d(8), gate)


def test_looking_for_gates_leaves_no_trace() -> None:
    model, calls = hooks_run_once(), []
    model[1][0].register_forward_hook(lambda *args: calls.append(1))
    mode, state = model[1].training, torch.get_rng_state()
    inject(model)
    assert not calls and model[1].training is mode
    assert torch.equal(torch.get_rng_state(), state)
    model[1](torch.randn(1, 8, 2, 2))
    assert calls == [1]


class InLists(nn.Module):
    """Res2Net's: convolutions in one list, their norms in another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(64, 64, 1), FrozenBatchNorm2d(64)
        self.convs = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)])
        self.bns = nn.ModuleList([FrozenBatchNorm2d(16) for _ in range(3)])


class InAttributes(nn.Module):
    """Convolutions first, then norms with names that tell nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(64, 16, 1), nn.Conv2d(16, 64, 1)
        self.normed, self.normalized = FrozenBatchNorm2d(16), FrozenBatchNorm2d(48)


def deep_stem() -> nn.Module:
    """A norm behind an nn.Sequential that ends in a convolution."""
    stem = nn.Module()
    stem.conv1 = nn.Sequential(
        nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3)
    )
    stem.bn1 = FrozenBatchNorm2d(16)
    return stem


def in_a_list_of_their_own() -> nn.Module:
    block = nn.Module()
    block.norms = nn.ModuleList([FrozenBatchNorm2d(8), FrozenBatchNorm2d(16)])
    block.convs = nn.ModuleList([nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 1)])
    return block


def in_a_conv_module() -> nn.Module:
    mmcv = pytest.importorskip("mmcv.cnn")
    conv = mmcv.ConvModule(3, 8, 1, norm_cfg={"type": "BN"})
    conv.bn = FrozenBatchNorm2d(8)
    return conv


HOLDERS = {
    "lists": InLists,
    "attributes": InAttributes,
    "a Sequential before it": deep_stem,
    "a list of their own": in_a_list_of_their_own,
    "a dict": lambda: nn.ModuleDict({"n": FrozenBatchNorm2d(3), "c": nn.Conv2d(3, 3, 1)}),
    "ConvModule": in_a_conv_module,
    "Detectron2's convolution": lambda: Conv2d(3, 8, 1, norm=FrozenBatchNorm2d(8)),
}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("holder", HOLDERS)
def test_frozen_stays_frozen_whatever_holds_the_norm(holder: str, trains: bool) -> None:
    model = nn.Module()
    model.stage, model.head = HOLDERS[holder]().requires_grad_(trains), nn.Conv2d(3, 3, 1)
    inject(model)
    found = [m for m in model.modules() if isinstance(m, FusedGroupNorm)]
    assert found and all(p.requires_grad is trains for m in found for p in m.parameters())


def test_a_norm_that_is_frozen_itself_stays_so_half_and_half() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model[1].weight.requires_grad_(False)
    inject(model)
    assert [p.requires_grad for p in model[1].parameters()] == [False, True]


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, nn.SyncBatchNorm, lambda c: nn.GroupNorm(4, c), FusedGroupNorm]
)
def test_parameters_that_exist_stay_the_same_objects(norm: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [id(p) for p in model.parameters()]
    inject(model)
    assert [id(p) for p in model.parameters()] == before
    model(torch.randn(2, 3, 4, 4)).square().sum().backward()
    optimizer.step()
    assert isinstance(model[1], FusedGroupNorm) and (model[1].weight != 1).all()


def test_norms_with_new_parameters_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), FrozenBatchNorm2d(8), nn.BatchNorm2d(8))
    with caplog.at_level(logging.INFO, "gn_det"):
        inject(model)
    (record,) = caplog.records
    assert "1 norms have new parameters" in record.message and record.message.endswith(": 1")


def test_classes_without_a_module_are_no_stumbling_block() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self[1](self[0](x))

    del forward.__module__
    kind = type("Head", (nn.Sequential,), {"forward": forward})
    own = type("Norm", (nn.BatchNorm2d,), {"forward": forward})
    for made in (kind, own):
        made.__module__ = None
    namespace: dict[str, object] = {}
    # As in the file of a LazyConfig, whose globals have no __name__.
    exec("made = type('Made', (Base,), {})", {"Base": nn.Sequential}, namespace)
    nameless = namespace["made"]
    model = nn.ModuleList([
        kind(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), own(8),
        nameless(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
    ])  # fmt: skip
    assert norms(inject(model, "ALL")) == ["0.1", "2.1"]
    assert audit(model).num_norms == 2


class Deformable(nn.Module):
    """A wrapper without a weight: one convolution predicts where the other one samples."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.offset = nn.Conv2d(channels, 18, 3, padding=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)


def test_a_norm_behind_a_wrapped_convolution_belongs_to_that() -> None:
    tower = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), Deformable(8), nn.BatchNorm2d(8)
    )
    tower[3].requires_grad_(False)
    tower[4] = FrozenBatchNorm2d(8)
    inject(tower)
    assert not tower[4].weight.requires_grad and tower[1].weight.requires_grad
