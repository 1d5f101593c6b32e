"""What a new run may start from."""

from __future__ import annotations

from gn_det.errors import InputError

__all__ = ["check_start"]


def check_start(weights: str, freeze_at: int) -> None:
    """Refuse a start from scratch with layers frozen at their random values.

    Detectron's GN R-50-FPN from scratch reached 39.5 box AP in 3x, and 36.2 with two stages frozen.

    Args:
        weights: file or URL to start from; empty for none.
        freeze_at: stages of the backbone that do not train, the stem being the first.

    Raises:
        InputError: there are no weights, and a stage is frozen.
    """
    if not weights and freeze_at > 0:
        raise InputError(
            f"without MODEL.WEIGHTS, MODEL.BACKBONE.FREEZE_AT {freeze_at} freezes random weights; "
            "set it to 0 to train from scratch, or name the weights to start from "
            "(for a LazyConfig, freeze_at of the ResNet and train.init_checkpoint)"
        )
