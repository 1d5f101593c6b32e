"""Peers are called with our tensors, and left out where they are not there or refuse them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_det.studies.kernels import installed


class Refuses(nn.GroupNorm):
    """As apex does what is not channels_last."""

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("channels_last only")


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("has_residual", [False, True])
def test_a_peer_that_is_installed_gets_our_tensors(
    activation: str | None, has_residual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {
        "torchnorm": SimpleNamespace(GroupNorm=nn.GroupNorm),
        "apex.contrib.group_norm": SimpleNamespace(GroupNorm=Refuses),
    }

    def import_module(name: str) -> object:
        if name not in packages:
            raise ImportError(name)
        return packages[name]

    monkeypatch.setattr(installed, "importlib", SimpleNamespace(import_module=import_module))
    x, residual = torch.randn(2, 2, 8, 3, 3, requires_grad=True).unbind()
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    arguments = {"x": x, "num_groups": 4, "weight": weight, "bias": bias}
    arguments |= {"activation": activation} | ({"residual": residual} if has_residual else {})
    peers = installed.installed_peers(arguments)
    assert peers.keys() == {"torchnorm"}
    expected = F.group_norm(x, 4, weight, bias) + (residual if has_residual else 0)
    expected = expected.relu() if activation else expected
    y = peers["torchnorm"](**arguments)
    torch.testing.assert_close(y, expected)
    assert torch.autograd.grad(y.sum(), weight)[0].abs().sum() > 0
    assert installed.installed_peers(arguments | {"normalize_residual": True}) == {}
