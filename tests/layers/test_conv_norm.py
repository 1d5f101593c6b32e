"""PyTorch's convolutions that end in a norm: called as those without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gn_det.layers import FusedGroupNorm
from gn_det.layers.conv_norm import give_norm


@pytest.mark.parametrize("scripted", [False, True])
@pytest.mark.parametrize("output_size", [None, [9, 9], [10, 10]])
def test_a_transposed_convolution_takes_an_output_size(
    output_size: list[int] | None, scripted: bool
) -> None:
    deconv = nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1, padding=1)
    x = torch.randn(1, 4, 5, 5)
    expected = deconv(x, output_size)
    give_norm(deconv, FusedGroupNorm(8, 2))
    model = torch.jit.script(deconv) if scripted else deconv
    torch.testing.assert_close(model(x, output_size), deconv.norm(expected))
