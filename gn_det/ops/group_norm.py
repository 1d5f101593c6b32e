"""Group normalization as a function: checks its arguments, then calls the kernel for the device."""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["group_norm"]


# Optional[Tensor], not Tensor | None: TorchScript reads these annotations.
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Optional[Tensor] = None,
    bias: Optional[Tensor] = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise groups of channels within each sample (Wu & He 2018, arXiv 1803.08494, eq. 7).

    Mean and variance are computed in float32 (float64 for float64 input), and the output keeps the
    input's dtype, under autocast too: there ATen alone would return float32.

    Args:
        x: (N, C, *spatial); N may be 0, as RoI heads send empty batches.
        num_groups: G, a divisor of C. G = 1 is layer norm over (C, *spatial), G = C instance norm.
        weight: γ of shape (C,), default 1.
        bias: β of shape (C,), default 0.
        eps: added to the biased variance.

    Returns:
        Tensor of x's shape and dtype.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: C is not a multiple of num_groups, or weight or bias is not of shape (C,).
    """
    if not x.is_floating_point():
        raise TypeError(f"group_norm needs a floating-point input, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"group_norm needs an input (N, C, *spatial), got shape {x.shape}")
    num_channels = x.size(1)
    if num_groups < 1 or num_channels % num_groups != 0:
        raise ValueError(
            f"the number of channels, {num_channels}, is not a multiple of num_groups, {num_groups}"
        )
    if weight is not None and (weight.dim() != 1 or weight.size(0) != num_channels):
        raise ValueError(f"weight has shape {weight.shape}, the input has {num_channels} channels")
    if bias is not None and (bias.dim() != 1 or bias.size(0) != num_channels):
        raise ValueError(f"bias has shape {bias.shape}, the input has {num_channels} channels")

    compute_dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.group_norm(
        x.to(compute_dtype),
        num_groups,
        weight.to(compute_dtype) if weight is not None else None,
        bias.to(compute_dtype) if bias is not None else None,
        eps,
    )
    return y.to(x.dtype)
