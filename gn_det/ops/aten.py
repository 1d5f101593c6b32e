"""The same function out of ATen's operators: for the CPU, export, scripting and other devices."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["group_norm_composed"]


# Optional[Tensor], not Tensor | None: TorchScript reads these annotations.
def group_norm_composed(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
    relu: bool,
    residual: Optional[Tensor],
    normalize_residual: bool,
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> Tensor:
    """The five forms of :func:`gn_det.group_norm`, computed in float32 or wider, in x's dtype."""
    # In place where it is ours alone: group_norm's backward needs its input, not its output.
    y = _normalize(x, num_groups, weight, bias, eps)
    if residual is not None:
        if normalize_residual:
            residual = _normalize(residual, num_groups, residual_weight, residual_bias, eps)
        y += residual
    if relu:
        y = torch.relu_(y)
    return y.to(x.dtype)


def _normalize(
    x: Tensor, num_groups: int, weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return F.group_norm(
        x.to(dtype),
        num_groups,
        weight.to(dtype) if weight is not None else None,
        bias.to(dtype) if bias is not None else None,
        eps,
    )
