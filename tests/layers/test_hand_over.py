"""What a hand-over takes from the BN that it begins with."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from gn_det.layers.hand_over import eps_of


class HardCoded(nn.Module):
    """A frozen BN as many projects have their own, with eps in its forward."""

    def __init__(self, eps: float, shift: bool) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((3,), -2.0))
        self.register_buffer("bias", torch.full((3,), 5.0) if shift else None)
        self.register_buffer("running_mean", torch.full((3,), 7.0))
        self.register_buffer("running_var", torch.full((3,), 0.5))
        self.secret = eps

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.secret).rsqrt()
        y = (x - self.running_mean[:, None, None]) * scale[:, None, None]
        return y if self.bias is None else y + self.bias[:, None, None]


@pytest.mark.parametrize(
    ("bn", "eps"),
    [
        (nn.BatchNorm2d(3, eps=1e-4), 1e-4),
        (FrozenBatchNorm2d(3, eps=1e-3), 1e-3),
        (BatchNormAct2d(3, eps=1e-2), 1e-2),
        (HardCoded(1e-5, shift=True), 1e-5),
        (HardCoded(1e-3, shift=True), 1e-3),
        (HardCoded(1e-3, shift=False), 1e-3),
        (HardCoded(0.0, shift=True), 0.0),
    ],
)
def test_eps_is_that_of_the_layer_also_where_only_its_forward_has_it(
    bn: nn.Module, eps: float
) -> None:
    before = {name: value.clone() for name, value in bn.state_dict().items()}
    assert eps_of(bn) == pytest.approx(eps, rel=1e-9)
    for name, value in bn.state_dict().items():
        assert torch.equal(value, before[name]), name
