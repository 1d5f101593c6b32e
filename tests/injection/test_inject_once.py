"""Convolutions whose norm is of a kind or in a place that nobody knows gain no second one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_det import inject
from gn_det.layers import FusedGroupNorm


def conv() -> nn.Conv2d:
    return nn.Conv2d(32, 32, 3, padding=1)


class NaiveGroupNorm(nn.Module):
    """As AdelaiDet has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(channels)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 8, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ModuleListDial(nn.ModuleList):
    """One norm after the other: each of a level of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self[0](x)


class NormAct(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(x))


KINDS = {
    "NaiveGroupNorm": NaiveGroupNorm,
    "InstanceNorm2d": nn.InstanceNorm2d,
    "LayerNorm2d": LayerNorm2d,
    "ModuleListDial": lambda channels: ModuleListDial([nn.BatchNorm2d(channels)]),
    "NormAct": NormAct,
}


class Head(nn.Module):
    """Layers that forward calls: each norm directly behind its convolution."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.pred = nn.Conv2d(32, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pred(F.relu(x))


def tower(kind: str) -> Head:
    norm = KINDS[kind]
    layers = (conv(), norm(32), nn.ReLU(), conv(), norm(32), nn.ReLU())
    return Head(cls_tower=nn.Sequential(*layers))


def attributes(kind: str) -> Head:
    norm = KINDS[kind]
    return Head(conv1=conv(), norm1=norm(32), conv2=conv(), norm2=norm(32), relu=nn.ReLU())


def lists(kind: str) -> Head:
    norm = KINDS[kind]
    norms = nn.ModuleList([norm(32) for _ in range(3)])  # of the levels, not of the convolutions
    return Head(convs=nn.ModuleList([conv(), conv()]), bns=norms, relu=nn.ReLU())


def lists_of_lists(kind: str) -> Head:
    norm = KINDS[kind]
    norms = nn.ModuleList([nn.ModuleList([norm(32), norm(32)]) for _ in range(2)])
    return Head(convs=nn.ModuleList([conv(), conv()]), bns=norms, relu=nn.ReLU())


def dicts(kind: str) -> Head:
    norm = KINDS[kind]
    convs, norms = nn.ModuleDict({"a": conv()}), nn.ModuleDict({"a": norm(32)})
    return Head(convs=convs, norms=norms, relu=nn.ReLU())


def pyramid(kind: str) -> Head:
    norm = KINDS[kind]
    parts = {f"{name}_convs": nn.ModuleList([conv(), conv()]) for name in ("lateral", "output")}
    parts |= {
        f"{name}_norms": nn.ModuleList([norm(32), norm(32)]) for name in ("lateral", "output")
    }
    return Head(**parts)


def in_a_model(head: nn.Module, place: str = "decode_head") -> nn.Module:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    model.add_module(place, head)
    return inject(model)


@pytest.mark.parametrize(
    ("layers", "norms"),
    [
        ({"dw": conv(), "pw": conv(), "bn": nn.BatchNorm2d(32), "act": nn.ReLU()}, 1),
        ({"conv1": conv(), "bn1": nn.BatchNorm2d(32), "conv2": conv(), "relu": nn.ReLU()}, 1),
        ({"conv1": conv(), "conv2": conv(), "norm": nn.BatchNorm2d(32), "relu": nn.ReLU()}, 1),
        ({"block": nn.Sequential(conv(), conv(), nn.BatchNorm2d(32), nn.ReLU())}, 1),
        (
            {
                "conv3x1_1": conv(), "conv1x3_1": conv(), "bn1": nn.BatchNorm2d(32),
                "conv3x1_2": conv(), "conv1x3_2": conv(), "bn2": nn.BatchNorm2d(32),
                "relu": nn.ReLU(),
            },
            2,
        ),
    ],
    ids=["depthwise", "second without", "shared", "sequence", "ERFNet"],
)  # fmt: skip
def test_a_norm_behind_several_convolutions_is_all_that_they_have(
    layers: dict[str, nn.Module], norms: int
) -> None:
    model = in_a_model(Head(**layers))
    found = [m for m in model.decode_head.modules() if isinstance(m, FusedGroupNorm)]
    assert len(found) == norms


class L2Norm(nn.Module):
    """Of the input of an SSD head, which has more channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(512))


class LossNormalizer(nn.Module):
    pass


class SGNLoss(nn.Module):
    pass


@pytest.mark.parametrize(
    "other",
    [L2Norm(), nn.LayerNorm(32), LossNormalizer(), SGNLoss()],
    ids=lambda module: type(module).__name__,
)
def test_a_norm_of_something_else_keeps_none_away(other: nn.Module) -> None:
    model = in_a_model(Head(convs=nn.ModuleList([conv(), conv()]), relu=nn.ReLU(), other=other))
    found = [m for m in model.decode_head.modules() if isinstance(m, FusedGroupNorm)]
    assert len(found) == 2


@pytest.mark.parametrize("kind", [*KINDS])
@pytest.mark.parametrize("place", ["head", "mask_head", "neck"])
@pytest.mark.parametrize("build", [tower, attributes, lists, lists_of_lists, dicts, pyramid])
def test_a_convolution_gains_no_second_norm(build, place: str, kind: str) -> None:
    model = nn.Module()
    model.backbone = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU())
    model.add_module(place, build(kind))
    replaceable = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    inject(model)
    gn = sum(isinstance(m, FusedGroupNorm) for m in model.modules())
    assert gn == replaceable  # in the places of BN, and nowhere else
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))
