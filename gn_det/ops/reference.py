"""The paper's formula, written to be read: the truth that every implementation is held to."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["group_norm_reference"]


def group_norm_reference(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Group normalization in float64, as Wu & He 2018 (arXiv 1803.08494) equations 1, 2, 6, 7.

    Args:
        x: (N, C, *spatial) of any floating dtype.
        num_groups: G, a divisor of C; each group holds C // G consecutive channels.
        weight: γ of shape (C,), or None for 1.
        bias: β of shape (C,), or None for 0.
        eps: added to the biased variance under the square root.

    Returns:
        float64 tensor of x's shape.
    """
    n, c = x.shape[:2]
    groups = x.double().reshape(n, num_groups, -1)
    mean = groups.mean(dim=2, keepdim=True)
    var = (groups - mean).square().mean(dim=2, keepdim=True)
    y = ((groups - mean) / torch.sqrt(var + eps)).reshape(x.shape)
    per_channel = (1, c) + (1,) * (x.dim() - 2)
    if weight is not None:
        y = y * weight.double().reshape(per_channel)
    if bias is not None:
        y = y + bias.double().reshape(per_channel)
    return y
