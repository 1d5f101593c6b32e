"""From tensors to launches: what is allocated, which kernels run on it, with how many programs.

Nothing is run until :func:`run`, so that on meta tensors the launches of any shape can be looked at
and compiled without a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gn_det.ops.form import Form
from gn_det.ops.kernels.backward import (
    apply_gradients_kernel,
    gradient_sums_kernel,
    one_pass_gradients_kernel,
    reduce_gradients_kernel,
)
from gn_det.ops.kernels.forward import apply_kernel, one_pass_kernel, statistics_kernel
from gn_det.ops.plan import MAX_ENTRIES, Plan, make_plan

__all__ = ["Inputs", "Launch", "backward_launches", "forward_launches", "run"]

# reduce_gradients_kernel reads little: enough threads to have its rows in flight at once.
REDUCTION_TILE = 2048
REDUCTION_THREADS = 256

# What 512 threads can have. Left alone, ptxas spills two registers in some one-pass backward
# kernels to end at 64; with a second norm it finds its way, and takes 136 for 7×7.
ONE_PASS_REGISTERS = 128


class Inputs(NamedTuple):
    """The tensors that group_norm takes, dense.

    Attributes:
        x: (N, C, *spatial).
        weight, bias: (C,) γ and β.
        residual: of x's shape, dtype and layout.
        residual_weight, residual_bias: (C,) γ and β of a residual that is normalized.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_weight: Tensor | None = None
    residual_bias: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """In the order in which the kernels take them."""
        return self.weight, self.bias, self.residual_weight, self.residual_bias


class Launch(NamedTuple):
    """One kernel over a one-dimensional grid.

    Attributes:
        arguments: tensors, None and sizes, in the kernel's order.
        constants: compile-time constants by name.
        num_threads: of a program.
        max_registers: bound for NVIDIA's assembler, where its own choice goes wrong.
    """

    kernel: Any
    num_programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_threads: int
    max_registers: int | None = None

    def options(self, warp_size: int, nvidia: bool) -> dict[str, int]:
        """Compiler options for a GPU."""
        options = {"num_warps": self.num_threads // warp_size}
        if nvidia and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run the launches in order on the device's current stream."""
    on_gpu = device.type == "cuda"
    warp_size = torch.cuda.get_device_properties(device).warp_size if on_gpu else 32
    nvidia = torch.version.hip is None
    with torch.cuda.device(device if on_gpu else -1):
        for launch in launches:
            options = launch.constants | launch.options(warp_size, nvidia)
            launch.kernel[(launch.num_programs,)](*launch.arguments, **options)


def forward_launches(
    inputs: Inputs, num_groups: int, eps: float, form: Form
) -> tuple[Tensor, Tensor, list[Launch]]:
    """y, the statistics (2 or 4, N, G) and the launches that fill them."""
    x, residual = inputs.x, inputs.residual
    y = torch.empty_like(x)
    plan = plan_of(x, num_groups, backward=False)
    statistics = x.new_empty(
        (4 if form.normalize_add else 2, plan.num_samples, num_groups), dtype=torch.float32
    )
    if x.numel() == 0:
        return y, statistics, []
    flags = {"NORMALIZE_RESIDUAL": form.normalize_add, "RELU": form.relu}
    if plan.one_pass:
        one_pass = Launch(
            one_pass_kernel,
            plan.num_programs,
            (x, y, residual, *inputs.parameters, statistics, eps, *sizes(plan)),
            tile(plan) | flags,
            plan.num_threads,
        )
        return y, statistics, [one_pass]
    partials = statistics.new_empty((*statistics.shape, plan.num_splits * plan.parts))
    moments = Launch(
        statistics_kernel,
        plan.num_programs * (2 if form.normalize_add else 1),
        (x, residual if form.normalize_add else None, partials, *sizes(plan), *splits(plan)),
        tile(plan) | {"PARTS": plan.parts},
        plan.num_threads,
    )
    apply = Launch(
        apply_kernel,
        plan.num_programs,
        (
            *(x, y, residual, *inputs.parameters, partials, statistics, eps),
            *(*sizes(plan), *splits(plan)),
        ),
        tile(plan) | {"PARTS": plan.parts, "MAX_ENTRIES": MAX_ENTRIES} | flags,
        plan.num_threads,
    )
    return y, statistics, [moments, apply]


def backward_launches(
    inputs: Inputs, y: Tensor | None, statistics: Tensor, dy: Tensor, num_groups: int, form: Form
) -> tuple[Tensor, Tensor | None, Tensor, list[Launch]]:
    """dx, the residual's gradient, dγ and dβ (2 or 4, C) in float32, and the launches for them.

    y and dy are dense and in x's layout. y is read only where form.keeps_output, the residual only
    where it is normalized. The second result is dy with ReLU's mask where y was read, the gradient
    of a normalized residual where there is one, else None.
    """
    x = inputs.x
    residual = inputs.residual if form.normalize_add else None
    y = y if form.keeps_output else None
    plan = plan_of(x, num_groups, backward=True)
    dx = torch.empty_like(x)
    dz = torch.empty_like(x) if form.keeps_output else None
    dresidual = torch.empty_like(x) if form.normalize_add else None
    dparameters = x.new_zeros(
        (4 if form.normalize_add else 2, plan.num_channels), dtype=torch.float32
    )
    residual_gradient = dresidual if form.normalize_add else dz
    if x.numel() == 0:
        return dx, residual_gradient, dparameters, []
    samples, rows = (1, plan.num_runs) if plan.one_pass else (plan.num_samples, plan.num_splits)
    partials = dparameters.new_empty(
        (3 if form.normalize_add else 2, samples, rows, plan.num_channels)
    )
    coefficients = None if plan.one_pass else statistics.new_empty((*statistics.shape, plan.parts))
    reduce = Launch(
        reduce_gradients_kernel,
        plan.num_tiles,
        (
            *(partials, dparameters, coefficients, inputs.weight, inputs.residual_weight),
            *(samples, num_groups, plan.num_channels, plan.num_pixels, rows),
        ),
        {
            "CHANNELS_PER_GROUP": plan.channels_per_group,
            "SEGMENTS": plan.segments,
            "LANES": plan.lanes,
            "PARTS": plan.parts,
            "BLOCK_ROWS": max(1, REDUCTION_TILE // (plan.segments * plan.lanes)),
            "NORMALIZE_RESIDUAL": form.normalize_add,
        },
        REDUCTION_THREADS,
    )
    if plan.one_pass:
        one_pass = Launch(
            one_pass_gradients_kernel,
            plan.num_runs * plan.num_tiles,
            (
                *(dy, x, dx, y, dz, residual, dresidual, *inputs.parameters, statistics, partials),
                *(*sizes(plan), plan.num_runs, plan.samples_per_run),
            ),
            tile(plan) | {"RELU": form.relu},
            plan.num_threads,
            None if form.normalize_add else ONE_PASS_REGISTERS,
        )
        return dx, residual_gradient, dparameters, [one_pass, reduce]
    sums = Launch(
        gradient_sums_kernel,
        plan.num_programs,
        (
            *(dy, x, y, dz, residual, *inputs.parameters, statistics, partials),
            *(*sizes(plan), *splits(plan)),
        ),
        tile(plan) | {"PARTS": plan.parts, "RELU": form.relu},
        plan.num_threads,
    )
    masked = dz is not None  # ReLU's mask is in dz already
    apply = Launch(
        apply_gradients_kernel,
        plan.num_programs,
        (
            *(dz if masked else dy, x, dx, residual, dresidual, *inputs.parameters),
            *(statistics, coefficients, *sizes(plan), *splits(plan)),
        ),
        tile(plan) | {"PARTS": plan.parts, "RELU": form.relu and not masked},
        plan.num_threads,
    )
    return dx, residual_gradient, dparameters, [sums, reduce, apply]


def plan_of(x: Tensor, num_groups: int, backward: bool) -> Plan:
    """The plan for a dense tensor (N, C, *spatial)."""
    return make_plan(
        num_samples=x.size(0),
        num_channels=x.size(1),
        num_pixels=x.shape[2:].numel(),
        num_groups=num_groups,
        itemsize=x.element_size(),
        channels_last=not x.is_contiguous(),
        backward=backward,
    )


def sizes(plan: Plan) -> tuple[int, ...]:
    return (
        plan.num_samples, plan.num_groups, plan.num_channels, plan.num_pixels, plan.num_tiles,
    )  # fmt: skip


def splits(plan: Plan) -> tuple[int, ...]:
    return plan.num_splits, plan.split_blocks


def tile(plan: Plan) -> dict[str, int]:
    """The compile-time constants."""
    return {
        "CHANNELS_PER_GROUP": plan.channels_per_group,
        "SEGMENTS": plan.segments,
        "LANES": plan.lanes,
        "BLOCK_PIXELS": plan.block_pixels,
        "VECTOR": plan.vector,
        "CHANNELS_LAST": plan.channels_last,
    }
