"""The kernels as PyTorch operators: implementation, shapes for the compiler, gradient formula."""

# No `from __future__ import annotations`: torch.library reads the annotations as objects.
from typing import Any, Optional

import torch
from torch import Tensor

from gn_det.ops import guarded
from gn_det.ops.aten import group_norm_composed
from gn_det.ops.form import Form

__all__ = [
    "dense_inputs",
    "fused_group_norm",
    "fused_group_norm_backward",
    "gradients",
    "kept",
    "layout_of",
]


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout that x is in, or nearest to: channels_last where its channels lie densest."""
    if x.dim() in (4, 5) and x.stride(1) == 1 and not x.is_contiguous():
        return torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _dense(
    tensor: Optional[Tensor], layout: torch.memory_format = torch.contiguous_format
) -> Optional[Tensor]:
    return None if tensor is None else tensor.contiguous(memory_format=layout)


def dense_inputs(
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> Any:
    """A gn_det.ops.kernels.launch.Inputs: x and the residual in the layout of x, all dense."""
    from gn_det.ops.kernels import launch

    layout = layout_of(x)
    return launch.Inputs(
        x.contiguous(memory_format=layout), _dense(weight), _dense(bias),
        _dense(residual, layout), _dense(residual_weight), _dense(residual_bias),
    )  # fmt: skip


def kept(
    form: Form,
    y: Tensor,
    statistics: Tensor,
    x: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> tuple[Optional[Tensor], ...]:
    """What the backward pass needs, in the order in which :func:`gradients` takes it."""
    return (
        x, y if form.keeps_output else None, statistics, weight, bias,
        residual if form.normalize_add else None, residual_weight, residual_bias,
    )  # fmt: skip


@torch.library.custom_op("gn_det::group_norm", mutates_args=())
def fused_group_norm(
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
) -> tuple[Tensor, Tensor]:
    """The five forms of :func:`gn_det.group_norm`, on arguments that it has checked.

    Returns:
        y of x's shape and dtype in x's layout, and the statistics, float32 (2, N, G): mean and
        1/√(variance + eps) of each group, followed by the residual's, (4, N, G), if normalized.
    """
    inputs = dense_inputs(x, weight, bias, residual, residual_weight, residual_bias)
    form = Form(relu, residual is not None, normalize_residual)
    return guarded.forward(inputs, num_groups, eps, form)


@fused_group_norm.register_fake
def _(
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
) -> tuple[Tensor, Tensor]:
    shape = (4 if normalize_residual else 2, x.size(0), num_groups)
    statistics = x.new_empty(shape, dtype=torch.float32)
    return torch.empty_like(x, memory_format=layout_of(x)), statistics


@torch.library.custom_op("gn_det::group_norm_backward", mutates_args=())
def fused_group_norm_backward(
    dy: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    statistics: Tensor,
    num_groups: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    residual: Optional[Tensor],
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`fused_group_norm`.

    Args:
        y: the output, given only where Form.keeps_output.
        residual: given only if it is normalized.

    Returns:
        dx; the residual's gradient, empty where that is dy or nothing; and float32 (2, C), dγ and
        dβ, followed by those of a normalized residual, (4, C).
    """
    layout = layout_of(x)
    inputs = dense_inputs(x, weight, bias, residual, residual_weight, residual_bias)
    # A residual that was only added, without a ReLU, leaves no trace here: its gradient is dy.
    form = Form(relu, y is not None or residual is not None, residual is not None)
    dx, dresidual, dparameters = guarded.backward(
        inputs,
        _dense(y, layout),
        statistics,
        dy.contiguous(memory_format=layout),
        num_groups,
        form,
    )
    return dx, x.new_empty(0) if dresidual is None else dresidual, dparameters


@fused_group_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    statistics: Tensor,
    num_groups: int,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    relu: bool,
    residual: Optional[Tensor],
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=layout_of(x))
    has_residual = y is not None or residual is not None
    dresidual = torch.empty_like(dx) if has_residual else x.new_empty(0)
    dparameters = x.new_empty((statistics.size(0), x.size(1)), dtype=torch.float32)
    return dx, dresidual, dparameters


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    (
        x, num_groups, weight, bias, eps, relu, residual, normalize_residual,
        residual_weight, residual_bias,
    ) = inputs  # fmt: skip
    y, statistics = output
    ctx.num_groups, ctx.eps = num_groups, eps
    ctx.form = Form(relu, residual is not None, normalize_residual)
    tensors = x, weight, bias, residual, residual_weight, residual_bias
    ctx.save_for_backward(*kept(ctx.form, y, statistics, *tensors))


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple:
    dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias = gradients(
        ctx.num_groups, ctx.eps, ctx.form, dy, *ctx.saved_tensors
    )
    return (
        dx, None, dweight, dbias, None, None, dresidual, None, dresidual_weight, dresidual_bias,
    )  # fmt: skip


def gradients(
    num_groups: int,
    eps: float,
    form: Form,
    dy: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    statistics: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> tuple[Optional[Tensor], ...]:
    """The gradients of x, weight, bias, the residual, its weight and its bias, or None.

    Args:
        y, residual: as for :func:`fused_group_norm_backward`.
    """
    if torch.is_grad_enabled():
        return _composed_gradients(
            num_groups, eps, form, dy, x, y, weight, bias, residual, residual_weight, residual_bias
        )
    dx, dresidual, dparameters = fused_group_norm_backward(
        dy, x, y, statistics, num_groups, weight, bias, form.relu,
        residual, residual_weight, residual_bias,
    )  # fmt: skip
    parameters = (weight, bias, residual_weight, residual_bias)
    dweight, dbias, dresidual_weight, dresidual_bias = (
        None if parameter is None else dparameters[row].to(parameter.dtype)
        for row, parameter in enumerate(parameters)
    )
    if not form.add:
        dresidual = None
    elif form == Form(add=True):
        dresidual = dy
    return dx, dweight, dbias, dresidual, dresidual_weight, dresidual_bias


def _composed_gradients(
    num_groups: int,
    eps: float,
    form: Form,
    dy: Tensor,
    x: Tensor,
    y: Optional[Tensor],
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    residual: Optional[Tensor],
    residual_weight: Optional[Tensor],
    residual_bias: Optional[Tensor],
) -> tuple[Optional[Tensor], ...]:
    """The same gradients by ATen operators, which have gradients of their own (create_graph)."""
    if y is not None:
        # The residual itself was not kept; its mask is all that is missing.
        dy = dy * (y > 0)
    inputs = [x, weight, bias, residual, residual_weight, residual_bias]
    z = group_norm_composed(
        x, num_groups, weight, bias, eps, form.relu and y is None,
        residual, form.normalize_add, residual_weight, residual_bias,
    )  # fmt: skip
    wanted = [i for i in inputs if i is not None and i.requires_grad]
    found = iter(torch.autograd.grad(z, wanted, dy, create_graph=True))
    results = [next(found) if i is not None and i.requires_grad else None for i in inputs]
    if form.add and not form.normalize_add:
        results[3] = dy
    return tuple(results)


fused_group_norm.register_autograd(_backward, setup_context=_setup_context)
