"""Group normalization as a function: checks its arguments, then calls the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from gn_det.ops import guarded
from gn_det.ops.aten import group_norm_composed
from gn_det.ops.backend import kernels_run_on, under_transform, warn_once
from gn_det.ops.eager import Kind, is_eager, key_of, kinds, remember
from gn_det.ops.form import Form
from gn_det.ops.reference import group_norm_reference
from gn_det.ops.triton_op import fused_group_norm, layout_of

__all__ = ["group_norm"]


def group_norm(
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
    """Normalize groups of channels within each sample (Wu & He 2018, arXiv 1803.08494, eq. 7).

    Optionally it also adds a residual and applies ReLU, which is how a residual block ends::

        group_norm(x, G, w, b)                                            GN(x)
        group_norm(x, G, w, b, activation="relu")                         relu(GN(x))
        group_norm(x, G, w, b, residual=r)                                GN(x) + r
        group_norm(x, G, w, b, residual=r, activation="relu")             relu(GN(x) + r)
        group_norm(x, G, w, b, residual=r, activation="relu",
                   normalize_residual=True, residual_weight=v, ...)       relu(GN(x) + GN(r))

    On CUDA and ROCm each of these is one call of fused Triton kernels, forward and backward. Other
    devices use ATen's operators; the environment variable GN_DET_BACKEND chooses, see
    gn_det.ops.backend. Computation is in float32 and the output has the dtype of x, under autocast
    as well, where ATen would return float32. float64 inputs are computed in float64 by
    :func:`gn_det.ops.reference.group_norm_reference`.

    Args:
        x: (N, C, *spatial) of 2 to 5 dimensions and any floating dtype, contiguous or
            channels_last. N may be 0, because RoI heads send empty batches.
        num_groups: G, a divisor of C. G = 1 is layer norm over (C, *spatial), G = C instance norm.
        weight: γ of shape (C,) and any floating dtype. Default: 1.
        bias: β of shape (C,) and any floating dtype. Default: 0.
        eps: added to the biased variance, default 1e-5.
        activation: None (default) or "relu", applied last.
        residual: of the shape, dtype and device of x, added before the activation. Under autocast,
            another dtype is cast to that of x (F.interpolate returns float32 there).
        normalize_residual: whether to normalize the residual as well, with the same num_groups and
            eps. Default: False.
        residual_weight, residual_bias: γ and β of the residual, only with normalize_residual.

    Returns:
        Tensor of the shape, dtype and layout of x.

    Raises:
        TypeError: a tensor is not floating-point, or the residual does not have the dtype of x.
        ValueError: shapes, devices or options do not fit; the message names the values.

    Example::

        x, shortcut = torch.randn(2, 2, 256, 50, 84)
        y = gn_det.group_norm(x, 32, residual=shortcut, activation="relu")
    """
    if is_eager() and kinds:
        # A call like this one was checked before.
        kind = kinds.get(
            key_of(
                num_groups, eps, activation, normalize_residual,
                x, weight, bias, residual, residual_weight, residual_bias,
            )
        )  # fmt: skip
        if kind is not None and kernels_run_on(kind.device_type):
            return kind(x, weight, bias, residual, residual_weight, residual_bias)

    _check_input(x, num_groups)
    _check_parameter("weight", weight, x)
    _check_parameter("bias", bias, x)
    if activation is not None and activation != "relu":
        raise ValueError(f'activation is "{activation}", not None or "relu"')
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual has shape {residual.shape}, the input {x.shape}")
        if residual.device != x.device:
            raise ValueError(f"residual is on {residual.device}, the input on {x.device}")
        if residual.dtype != x.dtype:
            if not _autocasts(x.device.type):
                raise TypeError(f"residual is {residual.dtype}, the input {x.dtype}")
            return group_norm(
                x, num_groups, weight, bias, eps,
                activation=activation, residual=residual.to(x.dtype),
                normalize_residual=normalize_residual,
                residual_weight=residual_weight, residual_bias=residual_bias,
            )  # fmt: skip
    elif normalize_residual:
        raise ValueError("normalize_residual is set, but there is no residual")
    if not normalize_residual and (residual_weight is not None or residual_bias is not None):
        raise ValueError("residual_weight and residual_bias need normalize_residual=True")
    _check_parameter("residual_weight", residual_weight, x)
    _check_parameter("residual_bias", residual_bias, x)
    relu = activation is not None
    takes_aten = torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or under_transform()

    if not torch.jit.is_tracing():
        if not torch.compiler.is_compiling() and 0 < x.numel() == x.size(0) * num_groups:
            warn_once(
                f"group_norm of an input {tuple(x.shape)} in {num_groups} groups: each is one "
                "value, and the output is the bias for any input; take fewer groups"
            )
        if x.dtype == torch.float64:
            y = group_norm_reference(
                x, num_groups, weight, bias, eps,
                activation=activation, residual=residual, normalize_residual=normalize_residual,
                residual_weight=residual_weight, residual_bias=residual_bias,
            )  # fmt: skip
            return y.contiguous(memory_format=layout_of(x))
        if kernels_run_on(x.device.type) and not takes_aten:
            tensors = x, weight, bias, residual, residual_weight, residual_bias
            if is_eager() and Kind.takes(tensors) and guarded.kernels_work(x.device, x.dtype):
                form = Form(relu, residual is not None, normalize_residual)
                kind = Kind(tensors, num_groups, eps, form)
                remember(key_of(num_groups, eps, activation, normalize_residual, *tensors), kind)
                return kind(*tensors)
            return fused_group_norm(
                x, num_groups, weight, bias, eps, relu,
                residual, normalize_residual, residual_weight, residual_bias,
            )[0]  # fmt: skip
    y = group_norm_composed(
        x, num_groups, weight, bias, eps, relu,
        residual, normalize_residual, residual_weight, residual_bias,
    )  # fmt: skip
    # ATen knows no channels_last on a GPU. What is traced or under a transform has no strides.
    return y if takes_aten else y.contiguous(memory_format=layout_of(x))


def _autocasts(device_type: str) -> bool:
    available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _check_input(x: Tensor, num_groups: int) -> None:
    if not x.is_floating_point():
        raise TypeError(f"group_norm needs a floating-point input, got {x.dtype}")
    if x.dim() < 2 or x.dim() > 5:
        raise ValueError(f"group_norm needs an input (N, C, *spatial), got shape {x.shape}")
    if num_groups < 1 or x.size(1) % num_groups != 0:
        raise ValueError(
            f"the number of channels, {x.size(1)}, is not a multiple of num_groups, {num_groups}"
        )
    if x.numel() == 0 and x.size(0) > 0:
        raise ValueError(f"there is nothing to normalize in an input of shape {x.shape}")


def _check_parameter(name: str, parameter: Tensor | None, x: Tensor) -> None:
    if parameter is not None:
        if parameter.dim() != 1 or parameter.size(0) != x.size(1):
            raise ValueError(
                f"{name} has shape {parameter.shape}, the input has {x.size(1)} channels"
            )
        if not parameter.is_floating_point():
            raise TypeError(f"{name} needs a floating-point dtype, got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name} is on {parameter.device}, the input on {x.device}")
