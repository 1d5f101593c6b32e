"""The class that mmcv's build_norm_layer calls."""

from __future__ import annotations

from typing import Any

from gn_det.errors import InputError
from gn_det.layers import FusedGroupNorm

__all__ = ["FusedGN"]


class FusedGN(FusedGroupNorm):
    """Makes a FusedGroupNorm, for a norm_cfg.

    Args:
        num_channels, kwargs: those of :class:`gn_det.FusedGroupNorm`, but for its activation.

    Raises:
        InputError: there is an activation. What takes a norm_cfg has its own, before or behind
            which the norm's would be a second one, or adds something in between.
    """

    def __new__(cls, num_channels: int, activation: None = None, **kwargs: Any) -> FusedGroupNorm:
        if activation is not None:
            raise InputError(
                f"activation={activation!r} has no place in a norm_cfg: the module that takes it "
                'has its own. For a norm that computes that too, build the model by type="InjectGN"'
                ", or call gn_det.fuse"
            )
        return FusedGroupNorm(num_channels, **kwargs)
