"""The same function out of ATen's operators: for the CPU, export, scripting and other devices."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from gn_det.ops.form import Form

__all__ = ["backward", "forward", "group_norm_composed"]


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
    y = _normalize(x, num_groups, weight, bias, eps)
    if residual is not None:
        if normalize_residual:
            residual = _normalize(residual, num_groups, residual_weight, residual_bias, eps)
        y = y + residual  # not in place: vmap may have samples of the residual alone
    if relu:
        y = torch.relu_(y)  # in place, as it is ours alone
    return y.to(x.dtype)


def _normalize(
    x: Tensor, num_groups: int, weight: Optional[Tensor], bias: Optional[Tensor], eps: float
) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Without the check of F.group_norm, which refuses groups of one value in one image alone.
    return torch.group_norm(
        x.to(dtype),
        num_groups,
        weight.to(dtype) if weight is not None else None,
        bias.to(dtype) if bias is not None else None,
        eps,
        torch.backends.cudnn.enabled,
    )


def forward(inputs: Any, num_groups: int, eps: float, form: Form) -> tuple[Tensor, Tensor]:
    """What the kernels' forward pass gives, where they cannot run; see triton_op.py.

    Args:
        inputs: a gn_det.ops.kernels.launch.Inputs.
    """
    z, statistics = _with_statistics(inputs.x, inputs.weight, inputs.bias, num_groups, eps)
    if form.normalize_add:
        parameters = inputs.residual_weight, inputs.residual_bias
        added, more = _with_statistics(inputs.residual, *parameters, num_groups, eps)
        z, statistics = z + added, torch.cat([statistics, more])
    elif form.add:
        z = z + inputs.residual
    return torch.empty_like(inputs.x).copy_(z.relu() if form.relu else z), statistics


def backward(
    inputs: Any, y: Optional[Tensor], statistics: Tensor, dy: Tensor, num_groups: int, form: Form
) -> tuple[Tensor, Optional[Tensor], Tensor]:
    """What the kernels' backward pass gives, where they cannot run; see triton_op.py."""
    x, weight, bias, residual, residual_weight, residual_bias = inputs
    norms = [(x, weight, bias, statistics[:2])]
    if form.normalize_add:
        norms.append((residual, residual_weight, residual_bias, statistics[2:]))
    dz = dy.float()
    if form.relu:
        z = sum((_from_statistics(*n) for n in norms), dz.new_zeros(())) if y is None else y
        dz = dz * (z > 0)
    gradients, parameters = [], []
    for tensor, gamma, _, (mean, rstd) in norms:
        n, c = tensor.shape[:2]
        dtensor, dgamma, dbeta = torch.ops.aten.native_group_norm_backward(
            dz.contiguous(), tensor.float().contiguous(), mean, rstd,
            tensor.new_ones(c, dtype=torch.float32) if gamma is None else gamma.float(),
            n, c, tensor.shape[2:].numel(), num_groups, [True, True, True],
        )  # fmt: skip
        gradients.append(torch.empty_like(tensor).copy_(dtensor))
        parameters += [dgamma, dbeta]
    if form.keeps_output:
        gradients.append(torch.empty_like(x).copy_(dz))
    dresidual = gradients[1] if len(gradients) > 1 else None
    return gradients[0], dresidual, torch.stack(parameters)


def _with_statistics(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], num_groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """The norm in float32, and the mean and 1/√(variance + eps) of each group, (2, N, G)."""
    n, c = x.shape[:2]
    z, mean, rstd = torch.native_group_norm(
        x.float().contiguous(),
        weight.float() if weight is not None else None,
        bias.float() if bias is not None else None,
        n, c, x.shape[2:].numel(), num_groups, eps,
    )  # fmt: skip
    return z, torch.stack([mean.view(n, num_groups), rstd.view(n, num_groups)])


def _from_statistics(
    x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], statistics: Tensor
) -> Tensor:
    """The norm in float32, without its sums."""
    mean, rstd = statistics[..., None]
    groups = x.float().reshape(*mean.shape[:2], x.numel() // max(1, mean.numel()))
    z = ((groups - mean) * rstd).view(x.shape)
    per_channel = (-1, *[1] * (x.dim() - 2))
    z = z if weight is None else z * weight.float().view(per_channel)
    return z if bias is None else z + bias.float().view(per_channel)
