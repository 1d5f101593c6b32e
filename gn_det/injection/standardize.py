"""Which convolutions can standardise their weight, and letting them, in place."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.fuse import BLOCKS
from gn_det.injection.sites import Slot, type_name
from gn_det.layers import WeightStandardized

__all__ = ["check_standardizable", "standardize", "why_not_standardizable"]

_TORCH = "torch.nn.modules.conv"
_NORM = "gn_det.layers.conv_norm"
_WS = "gn_det.layers.weight_standardization"

# By exact class, since a subclass may convolve with something else.
_STANDARDIZED = {
    f"{_TORCH}.Conv1d": (_WS, "ConvWS1d"),
    f"{_TORCH}.Conv2d": (_WS, "ConvWS2d"),
    f"{_TORCH}.Conv3d": (_WS, "ConvWS3d"),
    f"{_NORM}.ConvNorm1d": (_WS, "ConvWSNorm1d"),
    f"{_NORM}.ConvNorm2d": (_WS, "ConvWSNorm2d"),
    "detectron2.layers.wrappers.Conv2d": ("gn_det.layers.detectron2.blocks", "ConvWS2d"),
    f"{BLOCKS}.FusedConv2d": (BLOCKS, "FusedConvWS2d"),
}


def why_not_standardizable(conv: nn.Module | None) -> str | None:
    """Why the convolution before a norm cannot standardise its weight; None if it can, or does."""
    if conv is None:
        return "no convolution known before the norm whose weight could be standardised"
    if isinstance(conv, WeightStandardized) or type_name(type(conv)) in _STANDARDIZED:
        return None
    return f"{type(conv).__name__}, whose weight is not standardised"


def check_standardizable(slots: Sequence[Slot]) -> None:
    """Check that Weight Standardization would change something.

    Raises:
        InputError: no convolution of the slots can standardise its weight.
    """
    if all(why_not_standardizable(slot.conv) for slot in slots):
        reasons = [f"{slot.site} has {why_not_standardizable(slot.conv)}" for slot in slots]
        raise InputError(
            f"weight_standardization changes nothing: {'; '.join(dict.fromkeys(reasons))}"
        )


def standardize(conv: nn.Module | None) -> None:
    """Let a convolution standardise its weight, in place, where it can and does not yet."""
    kind = None if conv is None else type_name(type(conv))
    if kind in _STANDARDIZED:
        module, name = _STANDARDIZED[kind]
        conv.__class__ = getattr(importlib.import_module(module), name)
