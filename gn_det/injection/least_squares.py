"""The γ, β of a norm that come closest to given outputs, in closed form from sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ChannelFit"]

# Variance of x̂ below which a channel is constant: float32 leaves little of its differences.
_CONSTANT = 1e-10
_VALUES_AT_A_TIME = 2**22


class ChannelFit:
    """Least squares of y ≈ γ x̂ + β in each of C channels, from sums in float64.

    Attributes:
        inputs: (6, C) float64 of each input that was taken in: elements of a channel, Σx̂, Σx̂², Σy,
            Σy² and Σx̂y.
    """

    def __init__(self, inputs: Sequence[Tensor] = ()) -> None:
        self.inputs = [*inputs]

    def add(self, x_hat: Tensor, y: Tensor) -> None:
        """Take in (N, C, *spatial) inputs without affine, and the outputs wanted of them."""
        self.inputs.append(_sums(x_hat, y))

    def add_gn(self, x: Tensor, num_groups: int, eps: float, y: Tensor) -> None:
        """Take in inputs of GN with so many groups, and the outputs wanted of them.

        Float64 is taken for a few samples at a time.
        """
        samples = max(1, _VALUES_AT_A_TIME // max(1, x[:1].numel()))
        self.inputs.append(
            sum(
                _sums(F.group_norm(some_x.double(), num_groups, eps=eps), some_y)
                for some_x, some_y in zip(x.split(samples), y.split(samples), strict=True)
            )
        )

    def with_rest_of(self, before: ChannelFit | None) -> ChannelFit:
        """What was taken in so far, and of a fit before what is still to come in its place."""
        rest = [] if before is None else before.inputs[len(self.inputs) :]
        return ChannelFit([*self.inputs, *rest])

    @property
    def count(self) -> int:
        """Elements of a channel so far."""
        return int(self.sums[0, 0])

    @property
    def sums(self) -> Tensor:
        """(6, C) float64 over all inputs."""
        return torch.stack(self.inputs).sum(0)

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


def _sums(x_hat: Tensor, y: Tensor) -> Tensor:
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
