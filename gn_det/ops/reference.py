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
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    normalize_residual: bool = False,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor:
    """:func:`gn_det.group_norm` in float64, differentiable any number of times.

    Arguments are those of group_norm, tensors of any floating dtype and layout.

    Returns:
        float64 tensor of x's shape.
    """
    y = normalize_groups(x, num_groups, weight, bias, eps)
    if residual is not None:
        if normalize_residual:
            residual = normalize_groups(residual, num_groups, residual_weight, residual_bias, eps)
        y = y + residual.double()
    return torch.relu(y) if activation == "relu" else y


def normalize_groups(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Group normalization of (N, C, *spatial), as Wu & He 2018 (arXiv 1803.08494), section 3.1."""
    n, c = x.shape[:2]
    groups = x.double().reshape(n, num_groups, x[0:1].numel() // num_groups)  # equation 7
    mean = groups.mean(dim=2, keepdim=True)  # equation 2
    var = (groups - mean).square().mean(dim=2, keepdim=True)
    y = ((groups - mean) / torch.sqrt(var + eps)).reshape(x.shape)  # equation 1
    per_channel = (1, c) + (1,) * (x.dim() - 2)
    if weight is not None:
        y = y * weight.double().reshape(per_channel)  # equation 6
    if bias is not None:
        y = y + bias.double().reshape(per_channel)
    return y
