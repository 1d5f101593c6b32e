"""The kernels without an operator around them: the short road for tensors that are really there.

A custom operator costs the host more than a small kernel costs the GPU. Who needs it are compilers,
exports, fake tensors and transforms, which look at operators from the outside. Every other call is
looked up by its kind, that is by all but the values of its tensors, and goes straight to its
launches. What calls of a kind have in common is found in the first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from gn_det.ops import aten
from gn_det.ops.backend import under_transform
from gn_det.ops.form import Form
from gn_det.ops.guarded import give_up
from gn_det.ops.triton_op import dense_inputs, gradients, kept, layout_of

__all__ = ["Kind", "is_eager", "key_of", "kinds", "remember"]

# More than the norms of a model times the image sizes of an epoch; beyond, all are found again.
MAX_KINDS = 8192

kinds: dict[tuple, Kind] = {}


def is_eager() -> bool:
    """Whether nothing looks at operators from the outside."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack()
        or under_transform()
    )


def key_of(
    num_groups: int,
    eps: float,
    activation: str | None,
    normalize_residual: bool,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    residual_weight: Tensor | None,
    residual_bias: Tensor | None,
) -> tuple:
    """All that a call of group_norm is but the values of its tensors."""
    v, b, r, rv, rb = weight, bias, residual, residual_weight, residual_bias
    return (
        num_groups, eps, activation, normalize_residual,
        type(x), x.shape, x.stride(), x.dtype, x.device,
        None if v is None else (type(v), v.shape, v.stride(), v.dtype, v.device),
        None if b is None else (type(b), b.shape, b.stride(), b.dtype, b.device),
        None if r is None else (type(r), r.shape, r.stride(), r.dtype, r.device),
        None if rv is None else (type(rv), rv.shape, rv.stride(), rv.dtype, rv.device),
        None if rb is None else (type(rb), rb.shape, rb.stride(), rb.dtype, rb.device),
    )  # fmt: skip


def remember(key: tuple, kind: Kind) -> None:
    """Keep a kind, as one of MAX_KINDS."""
    if len(kinds) >= MAX_KINDS:
        kinds.clear()
    kinds[key] = kind


class Kind:
    """Calls of :func:`gn_det.group_norm` that differ in the values of their tensors only.

    Args:
        tensors: of one such call, which has been checked: x, weight, bias, the residual, its weight
            and its bias, or None.
        num_groups, eps, form: of all of them.
    """

    def __init__(self, tensors: tuple[Any, ...], num_groups: int, eps: float, form: Form) -> None:
        from gn_det.ops.kernels import launch

        x = tensors[0]
        self.num_groups, self.eps, self.form = num_groups, float(eps), form
        self.device_type = x.device.type
        self._device = x.device
        self._works = True
        self._layout = layout_of(x)
        self._launch = launch
        dense = dense_inputs(*tensors)
        self._is_dense = all(a is b for a, b in zip(dense, tensors, strict=True))
        plan = launch.plan_of(dense.x, num_groups, backward=False)
        self._forward = launch.Forward(plan, self.eps, form, x.device)
        plan = launch.plan_of(dense.x, num_groups, backward=True)
        self._backward = launch.Backward(plan, form)
        self._dtypes = [
            None if p is None else p.dtype for p in (*tensors[1:3], *tensors[4:])
        ]  # fmt: skip

    @staticmethod
    def takes(tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether all are tensors of PyTorch's own classes, of which nobody waits to be told."""
        return all(t is None or type(t) in (Tensor, Parameter) for t in tensors)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
    ) -> Tensor:
        if torch.is_grad_enabled() and (
            x.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
            or (residual_weight is not None and residual_weight.requires_grad)
            or (residual_bias is not None and residual_bias.requires_grad)
        ):
            return _GroupNorm.apply(
                self, x, weight, bias, residual, residual_weight, residual_bias
            )  # fmt: skip
        return self.forward(x, weight, bias, residual, residual_weight, residual_bias)[0]

    def forward(self, *tensors: Any) -> tuple[Tensor, Tensor]:
        """y and the statistics, as of fused_group_norm, of what a call takes."""
        if not self._is_dense:
            tensors = dense_inputs(*tensors)
        y, statistics, launches = self._forward(*tensors)
        if not self._ran(launches, tensors[0]):
            return aten.forward(self._launch.Inputs(*tensors), self.num_groups, self.eps, self.form)
        return y, statistics

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None,
        statistics: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of what :meth:`forward` takes, in its order."""
        layout = self._layout
        dense_dy = dy.contiguous(memory_format=layout)
        if y is not None:
            y = y.contiguous(memory_format=layout)
        if not self._is_dense:
            x, weight, bias, residual, residual_weight, residual_bias = dense_inputs(
                x, weight, bias, residual, residual_weight, residual_bias
            )
        dx, dresidual, dparameters, launches = self._backward(
            dense_dy, x, y, statistics, weight, bias, residual, residual_weight, residual_bias
        )
        if not self._ran(launches, x):
            inputs = self._launch.Inputs(x, weight, bias, residual, residual_weight, residual_bias)
            dx, dresidual, dparameters = aten.backward(
                inputs, y, statistics, dense_dy, self.num_groups, self.form
            )
        found: list[Tensor | None] = [None] * 4
        for row, gradient in enumerate(dparameters.unbind()):
            dtype = self._dtypes[row]
            if dtype is not None:
                found[row] = gradient if dtype == torch.float32 else gradient.to(dtype)
        if dresidual is None and self.form.add:  # without ReLU
            dresidual = dy
        return dx, found[0], found[1], dresidual, found[2], found[3]

    def _ran(self, launches: Any, x: Tensor) -> bool:
        """Whether launches could be run; where one cannot, calls go to ATen from then on."""
        if not self._works:
            return False
        try:
            self._launch.run(launches, self._device)
        except Exception as error:
            self._works = False
            kinds.clear()
            give_up(x, error)
        return self._works


class _GroupNorm(torch.autograd.Function):
    """Calls that are differentiated."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, *tensors: Any) -> Tensor:
        y, statistics = kind.forward(*tensors)
        ctx.kind = kind
        ctx.save_for_backward(*kept(kind.form, y, statistics, *tensors))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kind: Kind = ctx.kind
        if torch.is_grad_enabled() or not is_eager() or type(dy) is not Tensor:
            return None, *gradients(kind.num_groups, kind.eps, kind.form, dy, *ctx.saved_tensors)
        return None, *kind.backward(dy, *ctx.saved_tensors)
