"""The kernels held to the reference on a device, on a few small shapes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gn_det.ops.form import Form
from gn_det.ops.reference import group_norm_reference

__all__ = ["find_mismatch"]


class _Case(NamedTuple):
    shape: tuple[int, ...]
    num_groups: int
    form: Form
    layout: torch.memory_format


# Every kernel once: a group that fits into a program, with rows that no vector divides and so many
# samples that their sums are reduced, and one that takes several programs, with rows that all do
# and several groups in each, of three channels.
_CASES = (
    _Case((3, 6, 5, 7), 3, Form(relu=True), torch.contiguous_format),
    _Case((1, 12, 48, 48), 4, Form(relu=True, add=True, normalize_add=True), torch.channels_last),
)

_EPS = 1e-5


def find_mismatch(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run the kernels in a dtype on a device, and compare outputs and gradients with float64.

    The check runs in a thread of its own: nothing that the caller has set reaches it (autocast,
    inference mode, hooks on saved tensors, modes, functorch), and no random number is drawn.

    Returns:
        None, or what is wrong, with the value and the reference's.

    Raises:
        Exception: the kernels could not be compiled, loaded or launched.
    """
    from gn_det.ops.kernels import launch  # noqa: F401  (imported here, not in the thread)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_find_mismatch, device, dtype).result()


def _find_mismatch(device: torch.device, dtype: torch.dtype) -> str | None:
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    for case in _CASES:
        inputs, dy = _made_up(case, dtype)
        results = _by_kernels(case, {k: t.to(device) for k, t in inputs.items()}, dy.to(device))
        results = {name: result.cpu().double() for name, result in results.items()}
        truths = _by_reference(case, inputs, dy, results["y"] > 0)
        for name, truth in truths.items():
            error = (results[name] - truth).abs().nan_to_num(nan=torch.inf).flatten()
            worst = int(error.argmax())
            if error[worst] > tolerance * truth.abs().max():
                shape = "×".join(map(str, case.shape))
                return (
                    f"{name} of {case.form} on {shape} is {results[name].flatten()[worst]:.6g} "
                    f"where the reference has {truth.flatten()[worst]:.6g}"
                )
    return None


def _made_up(case: _Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    def image() -> Tensor:
        return random(*case.shape).to(dtype).contiguous(memory_format=case.layout)

    channels = case.shape[1]
    inputs = {"x": image(), "weight": random(channels), "bias": random(channels)}
    if case.form.normalize_add:
        inputs |= {
            "residual": image(),
            "residual_weight": random(channels),
            "residual_bias": random(channels),
        }
    return inputs, image()


def _by_kernels(case: _Case, tensors: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    from gn_det.ops.kernels import launch

    inputs = launch.Inputs(**tensors)
    y, statistics, launches = launch.forward_launches(inputs, case.num_groups, _EPS, case.form)
    launch.run(launches, dy.device)
    dx, dresidual, dparameters, launches = launch.backward_launches(
        inputs, None, statistics, dy, case.num_groups, case.form
    )
    launch.run(launches, dy.device)
    names = ("weight", "bias", "residual_weight", "residual_bias")
    gradients = {"x": dx, **dict(zip(names, dparameters, strict=False))}
    if dresidual is not None:
        gradients["residual"] = dresidual
    return {"y": y, **{f"gradient of {name}": value for name, value in gradients.items()}}


def _by_reference(
    case: _Case, tensors: dict[str, Tensor], dy: Tensor, positive: Tensor
) -> dict[str, Tensor]:
    """ReLU's gradient passes where the tested output does: rounding decides the side of 0."""
    leaves: dict[str, Any] = {name: t.double().requires_grad_() for name, t in tensors.items()}
    z = group_norm_reference(
        **leaves, num_groups=case.num_groups, eps=_EPS, normalize_residual=case.form.normalize_add
    )
    # Of a number: for gradients of tensors PyTorch imports SymPy, which takes a second.
    total = (z * dy.double() * positive).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    names = [f"gradient of {name}" for name in leaves]
    return {"y": z.detach().relu(), **dict(zip(names, gradients, strict=True))}
