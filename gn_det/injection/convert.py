"""Convert: give the convolutions of a built model a FusedGroupNorm, in place."""

from __future__ import annotations

import torch
from torch import nn

from gn_det.errors import InputError
from gn_det.layers import FusedGroupNorm, default_num_groups

__all__ = ["inject"]


def inject(model: nn.Module, num_groups: int = 32) -> nn.Module:
    """Give the convolutions of ResNets, FPNs, box heads and mask heads a FusedGroupNorm.

    In Mask R-CNN with FPN these are the sites that Detectron2's NORM keys reach: stem, blocks and
    shortcuts; lateral and output convolutions; the 3x3 convolutions of the heads. Norms elsewhere
    (the res5 head of a C4 model, a semantic segmentation head) stay as they are.

    A norm that is there (BN, SyncBN, FrozenBN, GN) is replaced, its γ and β carried over; a
    convolution without one gains it and loses its bias. The state-dict keys are then those of
    Detectron2's own ``NORM: "GN"`` model. A norm follows its convolution in device, dtype and
    whether it trains, so FREEZE_AT holds.

    Args:
        model: a Detectron2 model or a component of one; changed in place.
        num_groups: G; where the channels are no multiple of it, the largest divisor below it.

    Returns:
        model.

    Raises:
        InputError: the model has no such convolution, so nothing would change.
    """
    from gn_det.injection.sites import SITES, site_convolutions  # Detectron2 is optional

    convolutions = [conv for _, conv in site_convolutions(model)]
    if not convolutions:
        raise InputError(
            f"{type(model).__name__} has no convolution to normalise at any of the sites "
            f"{', '.join(SITES)}; a box head has some when MODEL.ROI_BOX_HEAD.NUM_CONV is above 0"
        )
    for conv in convolutions:
        conv.norm = _norm_for(conv, num_groups)
        conv.bias = None
    return model


def _norm_for(conv: nn.Module, num_groups: int) -> FusedGroupNorm:
    weight = conv.weight
    channels = conv.out_channels
    norm = FusedGroupNorm(
        channels,
        default_num_groups(channels, at_most=num_groups),
        device=weight.device,
        dtype=weight.dtype,
    )
    old = conv.norm
    if getattr(old, "weight", None) is not None:
        with torch.no_grad():
            norm.weight.copy_(old.weight)
            norm.bias.copy_(old.bias)
    return norm.requires_grad_(weight.requires_grad).train(conv.training)
