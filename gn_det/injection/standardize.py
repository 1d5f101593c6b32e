"""Which convolutions can standardize their weight, and letting them, in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.kinds import Layer, is_a
from gn_det.injection.sites import Slot
from gn_det.layers import WeightStandardized
from gn_det.layers.detectron2 import loaded_blocks
from gn_det.layers.weight_standardization import STANDARDIZED

__all__ = ["check_standardizable", "standardize", "standardizes", "why_not_standardizable"]

_OTHERS = (
    "mmcv.cnn.bricks.conv_ws.ConvWS2d",
    "mmcv.cnn.bricks.conv_ws.ConvAWS2d",
    "timm.layers.std_conv.StdConv2d",
    "timm.layers.std_conv.StdConv2dSame",
    "timm.layers.std_conv.ScaledStdConv2d",
    "timm.layers.std_conv.ScaledStdConv2dSame",
)


def why_not_standardizable(conv: Layer) -> str | None:
    """Why the convolution before a norm cannot standardize its weight; None if it can, or does."""
    if conv is None:
        return "no convolution known before the norm whose weight could be standardized"
    if standardizes(conv) or type(conv) in _standardized():
        return None
    return f"{type(conv).__name__}, whose weight is not standardized"


def standardizes(conv: Layer) -> bool:
    """Whether a convolution standardizes its weight, by our class or another library's."""
    return isinstance(conv, WeightStandardized) or (conv is not None and is_a(conv, *_OTHERS))


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
