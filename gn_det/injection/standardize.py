"""Which convolutions can standardize their weight, and letting them, in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.sites import Layer, Slot, type_name
from gn_det.layers import WeightStandardized
from gn_det.layers.detectron2 import loaded_blocks
from gn_det.layers.weight_standardization import STANDARDIZED

__all__ = ["check_standardizable", "is_standardized", "standardize", "why_not_standardizable"]

# Convolutions of others that standardize their weight themselves.
_THEIRS = {
    "mmcv.cnn.bricks.conv_ws.ConvWS2d",
    "mmcv.cnn.bricks.conv_ws.ConvAWS2d",
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
}


def is_standardized(conv: Layer) -> bool:
    """Whether a convolution standardizes its weight, by this package or of its own."""
    theirs = any(type_name(kind) in _THEIRS for kind in type(conv).__mro__)
    return isinstance(conv, WeightStandardized) or theirs


def why_not_standardizable(conv: Layer) -> str | None:
    """Why the convolution before a norm cannot standardize its weight; None if it can, or does."""
    if conv is None:
        return "no convolution known before the norm whose weight could be standardized"
    if is_standardized(conv) or type(conv) in _standardized():
        return None
    return f"{type(conv).__name__}, whose weight is not standardized"


def check_standardizable(slots: Sequence[Slot]) -> None:
    """Check that Weight Standardization would change something.

    Raises:
        InputError: no convolution of the slots can standardize its weight.
    """
    if all(why_not_standardizable(slot.conv) for slot in slots):
        reasons = [f"{slot.site} has {why_not_standardizable(slot.conv)}" for slot in slots]
        raise InputError(
            f"weight_standardization changes nothing: {'; '.join(dict.fromkeys(reasons))}"
        )


def standardize(conv: Layer) -> None:
    """Let a convolution standardize its weight, in place, where it can and does not yet."""
    kind = _standardized().get(type(conv))
    if kind is not None:
        conv.__class__ = kind


def _standardized() -> dict[type[nn.Module], type[nn.Module]]:
    """The classes with Weight Standardization, by those without."""
    blocks = loaded_blocks()
    return STANDARDIZED | (blocks.STANDARDIZED if blocks else {})
