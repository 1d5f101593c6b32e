"""The γ, β of a norm that come closest to given outputs, in closed form from sums."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ChannelFit", "sums_of", "sums_of_gn"]

# Variance of x̂ below which a channel is constant: float32 leaves little of its differences.
_CONSTANT = 1e-10
_VALUES_AT_A_TIME = 2**22


def sums_of(x_hat: Tensor, y: Tensor) -> Tensor:
    """What a fit needs to know of inputs without affine and of the outputs wanted of them.

    Sums of several inputs add up.

    Args:
        x_hat, y: (N, C, *spatial).

    Returns:
        (6, C) float64: elements of a channel, Σx̂, Σx̂², Σy, Σy² and Σx̂y.
    """
    x_hat, y = x_hat.double(), y.double()
    axes = [axis for axis in range(x_hat.dim()) if axis != 1]
    elements = y.new_full((y.shape[1],), y.numel() // y.shape[1])
    return torch.stack(
        [
            elements,
            x_hat.sum(axes),
            (x_hat * x_hat).sum(axes),
            y.sum(axes),
            (y * y).sum(axes),
            (x_hat * y).sum(axes),
        ]
    )


def sums_of_gn(x: Tensor, num_groups: int, eps: float, y: Tensor) -> Tensor:
    """:func:`sums_of` the inputs of GN with so many groups; float64 for a few samples at a time."""
    samples = max(1, _VALUES_AT_A_TIME // max(1, x[:1].numel()))
    parts = [
        sums_of(F.group_norm(some_x.double(), num_groups, eps=eps), some_y)
        for some_x, some_y in zip(x.split(samples), y.split(samples), strict=True)
    ]
    return torch.stack(parts).sum(0)


class ChannelFit:
    """Least squares of y ≈ γ x̂ + β in each of C channels.

    Attributes:
        sums: (6, C), see :func:`sums_of`.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    @property
    def count(self) -> int:
        """Elements of a channel."""
        return int(self.sums[0, 0])

    @property
    def constant(self) -> Tensor:
        """(C,) bool: channels whose x̂ does not vary, so that any γ fits as well."""
        x, xx, *_ = self._means()
        return xx - x * x <= _CONSTANT

    def solve(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The γ, β with the least Σ(γ x̂ + β − y)².

        Args:
            weight: (C,) γ for constant channels, where β alone is fitted.

        Returns:
            (C,) γ and β in float64.
        """
        x, xx, y, _, xy = self._means()
        slope = (xy - x * y) / (xx - x * x)
        weight = torch.where(self.constant, weight.double(), slope)
        return weight, y - weight * x

    def set(self, norm: nn.GroupNorm) -> None:
        """Give a norm the γ and β that :meth:`solve` finds, in place."""
        weight, bias = self.solve(norm.weight)
        with torch.no_grad():
            norm.weight.copy_(weight)
            norm.bias.copy_(bias)

    def relative_error(self, weight: Tensor, bias: Tensor) -> float | None:
        """‖γ x̂ + β − y‖ / ‖y − ȳ‖ over all channels, ȳ being the mean of each.

        So 1 is no better than a constant in each channel.

        Returns:
            None where y does not vary.
        """
        x, xx, y, yy, xy = self._means()
        w, b = weight.double(), bias.double()
        error = w * w * xx + b * b + yy + 2 * (w * b * x - w * xy - b * y)
        spread = (yy - y * y).sum().item()
        # Of the sums' last digits, nothing can be told.
        if spread <= 1e-12 * yy.sum().item():
            return None
        return (max(error.sum().item(), 0.0) / spread) ** 0.5

    def _means(self) -> Tensor:
        count, *sums = self.sums
        return torch.stack(sums) / count
