"""Modules on maps of one pixel are found, wherever the gate is that they belong to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gn_det.injection.one_pixel import gated_modules

C = 8


class Weights(nn.Module):
    """The weights of branches, from all of them: it takes no single map."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bn, self.up = nn.Conv2d(C, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2 * C, 1)

    def forward(self, branches: Tensor) -> Tensor:
        n, paths, c, *_ = branches.shape
        assert paths == 2
        x = branches.sum(1).mean((2, 3), keepdim=True)
        return torch.softmax(self.up(self.bn(self.down(x)).relu()).view(n, 2, c, 1, 1), dim=1)


class Selective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.paths = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.attention, self.bn = Weights(), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        branches = torch.stack([path(x) for path in self.paths], dim=1)
        return self.bn((branches * self.attention(branches)).sum(1))


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.Conv2d(3, C, 3), m)])
def test_a_gate_that_takes_branches_is_found_by_who_holds_it(wrap: object) -> None:
    block = Selective()
    attention = block.attention
    assert gated_modules(wrap(block)) == {attention.down, attention.bn, attention.up}


def test_what_cannot_be_run_tells_nothing() -> None:
    assert gated_modules(Weights()) == set()
