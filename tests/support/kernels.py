"""What the kernel tests share: inputs for the five forms, and the truth they are held to."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gn_det.ops import group_norm
from gn_det.ops.form import Form
from gn_det.ops.reference import group_norm_reference
from gn_det.ops.triton_op import fused_group_norm

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = [CONTIGUOUS, CHANNELS_LAST]

# Error of float32 arithmetic over thousands of elements, relative to the largest value.
FLOAT32_ERROR = 1e-5


def make_inputs(
    form: Form,
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = CONTIGUOUS,
    parameter_dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Random tensors for a form, by the names that group_norm has for them."""

    def image() -> Tensor:
        return (1.5 * torch.randn(shape) + 0.5).to(device, dtype).contiguous(memory_format=layout)

    def parameter() -> Tensor:
        return torch.randn(shape[1]).to(device, parameter_dtype)

    inputs = {"x": image(), "weight": parameter(), "bias": parameter()}
    if form.add:
        inputs["residual"] = image()
    if form.normalize_add:
        inputs |= {"residual_weight": parameter(), "residual_bias": parameter()}
    return inputs


def run_operator(form: Form, num_groups: int, inputs: dict[str, Tensor]) -> Tensor:
    """The output of the custom operator on inputs by group_norm's names."""
    return fused_group_norm(
        inputs["x"], num_groups, inputs["weight"], inputs["bias"], 1e-5, form.relu,
        inputs.get("residual"), form.normalize_add,
        inputs.get("residual_weight"), inputs.get("residual_bias"),
    )[0]  # fmt: skip


def run_kernels(
    form: Form, num_groups: int, inputs: dict[str, Tensor], dy: Tensor, eps: float = 1e-5
) -> tuple[Tensor, dict[str, Tensor]]:
    """y and the gradient of every input."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    y = group_norm(
        **leaves,
        num_groups=num_groups,
        eps=eps,
        activation="relu" if form.relu else None,
        normalize_residual=form.normalize_add,
    )
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return y.detach(), dict(zip(leaves, gradients, strict=True))


def find_truth(
    form: Form,
    num_groups: int,
    inputs: dict[str, Tensor],
    dy: Tensor,
    positive: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same in float64, ReLU's gradient passing where positive: y > 0 of the tested output.

    Rounding decides which side of 0 a value falls on; both sides are right.
    """
    leaves = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
    z = group_norm_reference(
        **leaves, num_groups=num_groups, eps=eps, normalize_residual=form.normalize_add
    )
    dz = dy.double() * positive if form.relu else dy.double()
    gradients = torch.autograd.grad(z, list(leaves.values()), dz)
    z = z.detach()
    return z.relu() if form.relu else z, dict(zip(leaves, gradients, strict=True))


def assert_rounded(name: str, actual: Tensor, truth: Tensor, error: float | Tensor) -> None:
    """Assert that actual is the truth but for error and one rounding to its dtype."""
    assert actual.shape == truth.shape, f"{name} has shape {actual.shape}"
    # Triton's interpreter rounds to bfloat16 by cutting bits off; GPUs round to nearest.
    ulps = 1.0 if INTERPRETED and actual.dtype == torch.bfloat16 else 0.5
    allowed = error + ulps * spacing(truth, actual.dtype)
    excess = ((actual.double() - truth).abs() - allowed).nan_to_num(nan=torch.inf)
    worst = excess.argmax()
    assert excess.max() <= 0, (
        f"{name}: {(excess > 0).sum()} of {truth.numel()} elements are off, the worst, number "
        f"{worst}, is {actual.flatten()[worst]} and not {truth.flatten()[worst]}"
    )


def spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours of a dtype at values."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal)).exponent - 1
    return info.eps * torch.exp2(exponent.double())


def largest_term(
    x: Tensor, weight: Tensor | None, dz: Tensor, num_groups: int, eps: float
) -> Tensor:
    """The largest rstd γ dz of each group, in x's shape: in small groups most of it cancels."""
    if weight is not None:
        dz = dz * weight.double().view(-1, *[1] * (x.dim() - 2))
    groups = x.double().reshape(x.size(0), num_groups, -1)
    rstd = (groups.var(dim=2, unbiased=False) + eps).rsqrt()
    largest = rstd * dz.reshape(groups.shape).abs().amax(dim=2)
    return largest[:, :, None].expand(groups.shape).reshape(x.shape)


def check_against_reference(
    form: Form,
    num_groups: int,
    inputs: dict[str, Tensor],
    dy: Tensor | None = None,
    eps: float = 1e-5,
    error: float = FLOAT32_ERROR,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Hold y and every gradient to the reference; dtypes, too.

    Args:
        error: of the arithmetic, relative to the largest value.

    Returns:
        y and the gradients by their inputs' names.
    """
    if dy is None:
        dy = torch.randn_like(inputs["x"])
    y, gradients = run_kernels(form, num_groups, inputs, dy, eps)
    truth_y, truths = find_truth(form, num_groups, inputs, dy, y > 0, eps)
    assert y.dtype == inputs["x"].dtype
    dz = dy.double() * (y > 0) if form.relu else dy.double()
    for name, actual, truth in [
        ("y", y, truth_y),
        *((name, gradients[name], truth) for name, truth in truths.items()),
    ]:
        if name != "y":
            assert actual.dtype == inputs[name].dtype, f"gradient of {name} is {actual.dtype}"
        if truth.numel() == 0:
            assert actual.shape == truth.shape
            continue
        scale = truth.abs().max()
        if name == "x" or (name == "residual" and form.normalize_add):
            weight = inputs.get("weight" if name == "x" else "residual_weight")
            scale = largest_term(inputs[name], weight, dz, num_groups, eps)
        assert_rounded(name if name == "y" else f"gradient of {name}", actual, truth, error * scale)
    return y, gradients
