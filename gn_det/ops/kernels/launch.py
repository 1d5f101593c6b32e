"""From tensors to launches: what is allocated, which kernels run on it, with how many programs.

Nothing is run until :func:`run`, so that on meta tensors the launches of any shape can be looked at
and compiled without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from gn_det.ops.form import Form
from gn_det.ops.kernels import TRITON_VERSION
from gn_det.ops.kernels.backward import (
    apply_gradients_kernel,
    gradient_sums_kernel,
    one_pass_gradients_kernel,
    reduce_gradients_kernel,
)
from gn_det.ops.kernels.forward import apply_kernel, one_pass_kernel, statistics_kernel
from gn_det.ops.plan import Plan, make_plan

__all__ = [
    "Backward",
    "Forward",
    "Inputs",
    "Launch",
    "Step",
    "backward_launches",
    "forward_launches",
    "plan_of",
    "run",
]

# A compiled kernel is called as compiled[grid](*arguments, stream=stream) in every Triton from 3.2
# to 3.8; from 3.3 on, its arguments include the compile-time constants. In another version, each
# launch goes through kernel[grid], as the documentation has it.
_VERSION = tuple(int(number) for number in TRITON_VERSION.split(".")[:2])
_DIRECT = (3, 2) <= _VERSION <= (3, 8)
_TAKES_CONSTANTS = _VERSION >= (3, 3)

# The widest load in bytes: what Triton asks of addresses.
ALIGNMENT = 16

# reduce_gradients_kernel reads little: enough programs and threads to have its rows in flight at
# once.
REDUCTION_CHANNELS = 16
REDUCTION_ROWS = 128
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


class Launch(NamedTuple):
    """One kernel over a one-dimensional grid.

    Attributes:
        arguments: tensors, None and sizes, in the kernel's order.
        constants: compile-time constants by name.
        num_threads: of a program.
        max_registers: bound for NVIDIA's assembler, where its own choice goes wrong.
        compiled: of the step that this is a launch of, if it may be called for this one.
    """

    kernel: Any
    num_programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    num_threads: int
    max_registers: int | None = None
    compiled: dict[int, Any] | None = None

    def options(self, warp_size: int, nvidia: bool) -> dict[str, int]:
        """Compiler options for a GPU."""
        options = {"num_warps": self.num_threads // warp_size}
        if nvidia and self.max_registers is not None:
            options["maxnreg"] = self.max_registers
        return options


class Step:
    """A launch but for its tensors, which differ from call to call: called with them, it is one.

    Attributes:
        compiled: what to call in place of the kernel, by device number, once a launch was run
            there. It is right for all launches of the step whose tensors start at multiples of 16
            bytes, since their types, sizes and constants are the same: nothing else changes what
            Triton compiles. Other launches are left to Triton.
    """

    def __init__(
        self,
        kernel: Any,
        num_programs: int,
        numbers: tuple[Any, ...],
        constants: dict[str, Any],
        num_threads: int,
        max_registers: int | None = None,
    ) -> None:
        self._kernel = kernel
        self._num_programs = num_programs
        self._numbers = numbers
        self._rest = constants, num_threads, max_registers
        self.compiled: dict[int, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> Launch:
        addresses = 0
        for tensor in tensors:
            if tensor is not None:
                addresses |= tensor.data_ptr()
        compiled = self.compiled if addresses % ALIGNMENT == 0 else None
        return Launch(
            self._kernel, self._num_programs, tensors + self._numbers, *self._rest, compiled
        )


def run(launches: Iterable[Launch], device: torch.device) -> None:
    """Run the launches in order on the device's current stream."""
    on_gpu = device.type == "cuda"
    if on_gpu and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return run(launches, device)
    index = device.index if on_gpu else 0
    stream = None
    for launch in launches:
        compiled = launch.compiled and launch.compiled.get(index)
        if not compiled:
            _compile_and_run(launch, index, on_gpu)
            continue
        if stream is None:
            stream = triton.runtime.driver.active.get_current_stream(index)
        runner, constants = compiled
        runner(*launch.arguments, *constants, stream=stream)


def _compile_and_run(launch: Launch, index: int, on_gpu: bool) -> None:
    """Run a launch as Triton documents it, and keep what was compiled."""
    warp_size = torch.cuda.get_device_properties(index).warp_size if on_gpu else 32
    options = launch.constants | launch.options(warp_size, nvidia=torch.version.hip is None)
    compiled = launch.kernel[(launch.num_programs,)](*launch.arguments, **options)
    # The interpreter compiles nothing.
    if _DIRECT and compiled is not None and launch.compiled is not None:
        names = launch.kernel.arg_names[len(launch.arguments) :] if _TAKES_CONSTANTS else ()
        constants = tuple(launch.constants[name] for name in names)
        launch.compiled[index] = compiled[(launch.num_programs, 1, 1)], constants


class Forward:
    """The forward pass for one plan and form: what it allocates, and its launches.

    Args:
        plan: made for the forward pass.
        device: of all tensors.
    """

    def __init__(self, plan: Plan, eps: float, form: Form, device: torch.device) -> None:
        self._float32 = torch.empty(0, dtype=torch.float32, device=device)
        self._shape = (4 if form.normalize_add else 2, plan.num_samples, plan.num_groups)
        self._normalize_add = form.normalize_add
        self._one_pass: Step | None = None
        flags = {"NORMALIZE_RESIDUAL": form.normalize_add, "RELU": form.relu}
        if plan.one_pass:
            self._one_pass = Step(
                one_pass_kernel,
                plan.num_programs,
                (eps, *sizes(plan)),
                tile(plan) | flags,
                plan.num_threads,
            )
            return
        self._partials = (*self._shape, plan.num_splits * plan.parts)
        self._moments = Step(
            statistics_kernel,
            plan.num_programs * (2 if form.normalize_add else 1),
            (*sizes(plan), *splits(plan)),
            tile(plan) | {"PARTS": plan.parts},
            plan.num_threads,
        )
        self._apply = Step(
            apply_kernel,
            plan.num_programs,
            (eps, *sizes(plan), *splits(plan)),
            tile(plan) | {"PARTS": plan.parts, "MAX_ENTRIES": plan.max_entries} | flags,
            plan.num_threads,
        )

    def __call__(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        residual_weight: Tensor | None,
        residual_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, tuple[Launch, ...]]:
        """y, the statistics (2 or 4, N, G) in float32, and the launches that fill them."""
        y = torch.empty_like(x)
        statistics = self._float32.new_empty(*self._shape)  # at half the cost of a dtype
        if self._shape[1] == 0:
            return y, statistics, ()
        parameters = weight, bias, residual_weight, residual_bias
        if self._one_pass is not None:
            return y, statistics, (self._one_pass(x, y, residual, *parameters, statistics),)
        partials = statistics.new_empty(*self._partials)
        moments = self._moments(x, residual if self._normalize_add else None, partials)
        apply = self._apply(x, y, residual, *parameters, partials, statistics)
        return y, statistics, (moments, apply)


class Backward:
    """The backward pass for one plan and form: what it allocates, and its launches.

    Args:
        plan: made for the backward pass.
    """

    def __init__(self, plan: Plan, form: Form) -> None:
        self._form = form
        self._planes = 4 if form.normalize_add else 2
        self._parameters = (self._planes, plan.num_channels)
        self._empty = plan.num_samples == 0
        self._one_pass: Step | None = None
        if plan.one_pass:
            self._one_pass = Step(
                one_pass_gradients_kernel,
                plan.num_runs * plan.num_tiles,
                (*sizes(plan), plan.num_runs, plan.samples_per_run),
                tile(plan) | {"RELU": form.relu},
                plan.num_threads,
                None if form.normalize_add else ONE_PASS_REGISTERS,
            )
            self._partials = (self._planes, plan.num_runs, plan.num_channels)
            num_tiles = math.ceil(plan.num_channels / REDUCTION_CHANNELS)
            self._reduce = Step(
                reduce_gradients_kernel,
                self._planes * num_tiles,
                (plan.num_channels, plan.num_runs, num_tiles),
                {"BLOCK_CHANNELS": REDUCTION_CHANNELS, "BLOCK_ROWS": REDUCTION_ROWS},
                REDUCTION_THREADS,
            )
            return
        rows = plan.num_samples * plan.num_splits
        self._partials = (3 if form.normalize_add else 2, rows, plan.num_channels)
        self._coefficients = (
            *(self._planes, plan.num_samples, plan.num_groups, plan.num_splits * plan.parts),
        )
        self._sums = Step(
            gradient_sums_kernel,
            plan.num_programs,
            (*sizes(plan), *splits(plan)),
            tile(plan) | {"PARTS": plan.parts, "RELU": form.relu},
            plan.num_threads,
        )
        self._apply = Step(
            apply_gradients_kernel,
            plan.num_programs,
            (*sizes(plan), *splits(plan)),
            tile(plan)
            | {"PARTS": plan.parts, "MAX_ENTRIES": plan.max_entries}
            | {"RELU": form.relu and not form.keeps_output},  # else the mask is in dz already
            plan.num_threads,
        )

    def __call__(
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
    ) -> tuple[Tensor, Tensor | None, Tensor, tuple[Launch, ...]]:
        """dx, the residual's gradient, dγ and dβ (2 or 4, C) in float32, and their launches.

        y is taken only where form.keeps_output, the residual only where it is normalized, else
        None. The second result is dy with ReLU's mask where y was read, the gradient of a
        normalized residual where there is one, else None.
        """
        form = self._form
        dx = torch.empty_like(x)
        dz = torch.empty_like(x) if form.keeps_output else None
        dresidual = torch.empty_like(x) if form.normalize_add else None
        residual_gradient = dresidual if form.normalize_add else dz
        dparameters = statistics.new_empty(*self._parameters)
        if self._empty:
            return dx, residual_gradient, dparameters.zero_(), ()
        parameters = weight, bias, residual_weight, residual_bias
        if self._one_pass is not None:
            one_run = self._partials[1] == 1
            partials = dparameters if one_run else statistics.new_empty(*self._partials)
            one_pass = self._one_pass(
                dy, x, dx, y, dz, residual, dresidual, *parameters, statistics, partials
            )
            rest = () if one_run else (self._reduce(partials, dparameters),)
            return dx, residual_gradient, dparameters, (one_pass, *rest)
        partials = statistics.new_empty(*self._partials)
        coefficients = statistics.new_empty(*self._coefficients)
        sums = self._sums(
            dy, x, y, dz, residual, *parameters, statistics, partials, coefficients
        )  # fmt: skip
        apply = self._apply(
            dy if dz is None else dz, x, dx, residual, dresidual, *parameters,
            statistics, partials, coefficients, dparameters,
        )  # fmt: skip
        return dx, residual_gradient, dparameters, (sums, apply)


def forward_launches(
    inputs: Inputs, num_groups: int, eps: float, form: Form
) -> tuple[Tensor, Tensor, tuple[Launch, ...]]:
    """What :class:`Forward` gives for inputs."""
    plan = plan_of(inputs.x, num_groups, backward=False)
    return Forward(plan, eps, form, inputs.x.device)(*inputs)


def backward_launches(
    inputs: Inputs, y: Tensor | None, statistics: Tensor, dy: Tensor, num_groups: int, form: Form
) -> tuple[Tensor, Tensor | None, Tensor, tuple[Launch, ...]]:
    """What :class:`Backward` gives for inputs; y and dy are dense and in x's layout."""
    if not form.keeps_output:
        y = None
    if not form.normalize_add:
        inputs = inputs._replace(residual=None)
    backward = Backward(plan_of(inputs.x, num_groups, backward=True), form)
    return backward(dy, inputs.x, y, statistics, *inputs[1:])


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
