"""PyTorch's convolutions with a norm of their own, for heads that have no place for one."""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as F
from torch import Tensor, nn

from gn_det.errors import InputError

__all__ = [
    "ConvNorm1d",
    "ConvNorm2d",
    "ConvTransposeNorm2d",
    "FusedReLU",
    "give_norm",
    "takes_norm",
]


class ConvNorm1d(nn.Conv1d):
    """nn.Conv1d, then its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolved(x))

    def convolved(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return self._conv_forward(x, self.weight, self.bias)


class ConvNorm2d(nn.Conv2d):
    """nn.Conv2d, then its norm."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convolved(x))

    def convolved(self, x: Tensor) -> Tensor:
        """The convolution alone."""
        return self._conv_forward(x, self.weight, self.bias)


class ConvTransposeNorm2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d, then its norm."""

    def forward(self, x: Tensor, output_size: Optional[list[int]] = None) -> Tensor:
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        x = F.conv_transpose2d(
            x, self.weight, self.bias,
            self.stride, self.padding, output_padding, self.groups, self.dilation,
        )  # fmt: skip
        return self.norm(x)


class FusedReLU(nn.ReLU):
    """An nn.ReLU that does nothing, since the norm before it applies it already."""

    def forward(self, x: Tensor) -> Tensor:
        return x


_WITH_NORM = {
    nn.Conv1d: ConvNorm1d,
    nn.Conv2d: ConvNorm2d,
    nn.ConvTranspose2d: ConvTransposeNorm2d,
}
# mmcv's subclasses, which differ with a PyTorch of before 1.5 alone.
_SAME = "mmcv.cnn.bricks.wrappers"


def takes_norm(conv: nn.Module) -> bool:
    """Whether :func:`give_norm` can let a convolution end in a norm."""
    return hasattr(conv, "norm") or _with_norm(conv) is not None


def give_norm(conv: nn.Module, norm: nn.Module) -> None:
    """Let a convolution end in a norm, in place: whoever holds the convolution keeps it.

    Args:
        conv: one with an attribute ``norm``, as Detectron2's have, or a plain one of PyTorch's or
            mmcv's, whose class becomes the one with a norm.
        norm: for conv.out_channels channels.

    Raises:
        InputError: conv is neither.
    """
    if not hasattr(conv, "norm"):
        kind = _with_norm(conv)
        if kind is None:
            known = ", ".join(f"nn.{kind.__name__}" for kind in _WITH_NORM)
            raise InputError(
                f"{type(conv).__name__} has no place for a norm: it has no attribute norm, and is "
                f"none of {known}"
            )
        conv.__class__ = kind
    conv.norm = norm


def _with_norm(conv: nn.Module) -> type[nn.Module] | None:
    kind = type(conv)
    return _WITH_NORM.get(kind.__base__ if getattr(kind, "__module__", None) == _SAME else kind)
