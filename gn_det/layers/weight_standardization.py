"""Weight Standardization, and PyTorch's convolutions with it (Qiao et al. 2019, arXiv 1903.10520).

Detectron2's are in detectron2/blocks.py. Each is a subclass of the convolution that it stands for,
with the same parameters: ``weight`` is the one that is learnt, and is standardized whenever the
convolution runs.
"""

from __future__ import annotations

import math

import torch
import torch.fx
from torch import Tensor, nn

from gn_det.layers.conv_norm import ConvNorm1d, ConvNorm2d

__all__ = [
    "STANDARDIZED",
    "ConvWS1d",
    "ConvWS2d",
    "ConvWS3d",
    "ConvWSNorm1d",
    "ConvWSNorm2d",
    "WeightStandardized",
    "standardize_weight",
]

# It asks for dtype and shape, which torch.fx does not know while it records.
torch.fx.wrap("standardize_weight")


def standardize_weight(weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Give the weights of every output channel mean 0 and standard deviation 1.

    ``(w - mean) / (std + eps)`` over a channel's inputs and kernel, section 2 of the paper. As in
    the authors' code and mmcv's ConvWS, std is the unbiased one, where the paper divides by the
    number of weights.

    Args:
        weight: (out_channels, in_channels / groups, *kernel), of any floating dtype. Half-precision
            weights are standardized in float32.
        eps: added to the standard deviation.

    Returns:
        Tensor of weight's shape, dtype and memory format. In channels whose weights are equal it is
        0, with a finite gradient.
    """
    low_precision = weight.dtype == torch.float16 or weight.dtype == torch.bfloat16
    exact = weight.float() if low_precision else weight
    dims = list(range(1, weight.dim()))
    centered = exact - exact.mean(dims, keepdim=True)
    # By a norm, whose gradient at 0 is 0, where that of sqrt is infinite. A channel of one weight
    # has no unbiased deviation.
    count = weight[0].numel()
    std = torch.linalg.vector_norm(centered, 2.0, dims, True) / math.sqrt(max(count - 1, 1))
    return (centered / (std + eps)).to(weight.dtype)


class WeightStandardized:
    """A convolution that standardizes its weight; stands before PyTorch's class among the bases."""

    def convolved(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return self._conv_forward(x, standardize_weight(self.weight), self.bias)


class ConvWS1d(WeightStandardized, nn.Conv1d):
    """nn.Conv1d with Weight Standardization."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x)


class ConvWS2d(WeightStandardized, nn.Conv2d):
    """nn.Conv2d with Weight Standardization."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x)


class ConvWS3d(WeightStandardized, nn.Conv3d):
    """nn.Conv3d with Weight Standardization."""

    def forward(self, x: Tensor) -> Tensor:
        return self.convolved(x)


class ConvWSNorm1d(WeightStandardized, ConvNorm1d):
    """ConvWS1d, then its norm."""


class ConvWSNorm2d(WeightStandardized, ConvNorm2d):
    """ConvWS2d, then its norm."""


# The class with Weight Standardization, by exact class, since a subclass may convolve with
# something else.
STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: ConvWS1d,
    nn.Conv2d: ConvWS2d,
    nn.Conv3d: ConvWS3d,
    ConvNorm1d: ConvWSNorm1d,
    ConvNorm2d: ConvWSNorm2d,
}
