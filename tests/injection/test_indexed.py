"""Towers whose layers code takes by their numbers, which an inserted norm would change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gn_det import inject
from gn_det.layers import FusedGroupNorm


def tower() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)
    )


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tower = tower()
        nn.init.zeros_(self.tower[0].bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.tower[2].bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x)


class ByNumber(Whole):
    def forward(self, x: Tensor) -> Tensor:
        for n in (0, 1, 2, 3, 4):
            x = self.tower[n](x)
        return x


class Slices(Whole):
    def forward(self, x: Tensor) -> Tensor:
        return self.tower[2:](self.tower[:2](x))


class ViaAnotherMethod(Whole):
    def features(self, x: Tensor) -> Tensor:
        return self.tower[1](self.tower[0](x))

    def forward(self, x: Tensor) -> Tensor:
        return self.tower[4](self.tower[3](self.tower[2](self.features(x))))


class ByNumberOfItsBase(ByNumber):
    pass


class ByALocalName(Whole):
    def forward(self, x: Tensor) -> Tensor:
        layers = self.tower
        for n in range(5):
            x = layers[n](x)
        return x


class ListOfItsChildren(Whole):
    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.tower.children())
        for layer in layers[:4]:
            x = layer(x)
        return layers[4](x)


class OneNameForSeveral(Whole):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        layers: nn.Sequential = self.tower
        for n in range(5):
            x = layers[n](x)
        layers = self.other
        return layers[0](x)


class Unpacked(Whole):
    def forward(self, x: Tensor) -> Tensor:
        first, relu, second, _, third = self.tower
        return third(relu(second(relu(first(x)))))


class OneByOne(Whole):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.tower:
            x = layer(x)
        return x


class OneOfSeveral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList([tower()])

    def forward(self, x: Tensor) -> Tensor:
        return self.towers[0](x)


class NumberOfEach(OneOfSeveral):
    def forward(self, x: Tensor) -> Tensor:
        for layers in self.towers:
            for n in range(5):
                x = layers[n](x)
        return x


class NumberOfOneOfSeveral(OneOfSeveral):
    def forward(self, x: Tensor) -> Tensor:
        for n in range(5):
            x = self.towers[0][n](x)
        return x


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.mark.parametrize(
    ("head", "layers"),
    [
        (Whole, 7),
        (OneOfSeveral, 7),
        (ByNumber, 5),
        (Slices, 5),
        (ViaAnotherMethod, 5),
        (ByNumberOfItsBase, 5),
        (NumberOfOneOfSeveral, 5),
        (NumberOfEach, 5),
        (ByALocalName, 5),
        (ListOfItsChildren, 5),
        (Unpacked, 5),
        (OneNameForSeveral, 5),
        (OneByOne, 7),
    ],
)
def test_every_norm_of_a_tower_runs_however_code_takes_its_layers(
    head: type[nn.Module], layers: int
) -> None:
    model = inject(Model(head()))
    found, *_ = [m for m in model.head.modules() if isinstance(m, nn.Sequential)]
    assert len(found) == layers
    norms = [m for m in model.head.modules() if isinstance(m, FusedGroupNorm)]
    ran: set[nn.Module] = set()
    for norm in norms:
        norm.register_forward_hook(lambda module, *_: ran.add(module))
    model(torch.rand(1, 3, 12, 12))
    assert len(ran) == len(norms) > 0
