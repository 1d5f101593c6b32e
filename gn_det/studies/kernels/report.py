"""What the group_norm kernels cost, counted: the rows of tools/benchmark_group_norm.py.

Launch plans are those that a real launch uses, at full size. Bytes are counted in Triton's
interpreter, so that :func:`traffic_row` and :func:`accuracy_rows` need TRITON_INTERPRET=1, and
:func:`code_rows` a process without it. :func:`timing_row` needs a GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from gn_det.ops import group_norm
from gn_det.ops.form import FORMS, Form
from gn_det.ops.reference import group_norm_reference
from gn_det.studies.kernels.installed import installed_peers

__all__ = [
    "CHECKED_DTYPES",
    "DTYPES",
    "LAYOUTS",
    "Case",
    "accuracy_rows",
    "check_row",
    "code_rows",
    "launches_of",
    "mask_rcnn_cases",
    "passes_of",
    "timing_row",
    "traffic_row",
]

NUM_GROUPS = 32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_DTYPES = DTYPES | {"fp16": torch.float16}
ROUNDS, CALLS = 5, 10  # of timing
CACHE_BYTES = 2**28  # more than any GPU's L2 cache holds
BUSY_FILLS = 6  # of as many bytes: half a millisecond on an H100
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """A place in Mask R-CNN where GN stands, and the shape there."""

    name: str
    shape: tuple[int, int, int, int]


def mask_rcnn_cases(images: int) -> list[Case]:
    """Mask R-CNN R-50-FPN on images of 800×1333, padded to 800×1344, with 4conv1fc heads."""
    body = [
        ("stem", 64, 400, 672),
        ("res2 conv1-2", 64, 200, 336),
        ("res2 conv3", 256, 200, 336),
        ("res3 conv1-2", 128, 100, 168),
        ("res3 conv3", 512, 100, 168),
        ("res4 conv1-2", 256, 50, 84),
        ("res4 conv3", 1024, 50, 84),
        ("res5 conv1-2", 512, 25, 42),
        ("res5 conv3", 2048, 25, 42),
        ("FPN, RPN P2", 256, 200, 336),
        ("FPN, RPN P3", 256, 100, 168),
        ("FPN, RPN P4", 256, 50, 84),
        ("FPN, RPN P5", 256, 25, 42),
        ("FPN, RPN P6", 256, 13, 21),
    ]
    return [Case(name, (images, *shape)) for name, *shape in body] + [
        Case("box head", (512 * images, 256, 7, 7)),
        Case("mask head", (128 * images, 256, 14, 14)),
    ]


def launches_of(
    shape: tuple[int, ...],
    form: Form,
    dtype: torch.dtype,
    layout: torch.memory_format,
    device: str = "meta",
    num_groups: int = NUM_GROUPS,
) -> tuple[list[Any], list[Any]]:
    """Launches of the forward and the backward pass, with float32 parameters.

    Returns:
        Two lists of gn_det.ops.kernels.launch.Launch, on zeros.
    """
    from gn_det.ops.kernels.launch import Inputs, backward_launches, forward_launches

    x = torch.zeros(shape, dtype=dtype, device=device).contiguous(memory_format=layout)
    parameter = torch.ones(shape[1], device=device)
    residual = torch.zeros_like(x) if form.add else None
    residual_parameter = parameter if form.normalize_add else None
    inputs = Inputs(x, parameter, parameter, residual, residual_parameter, residual_parameter)
    y, statistics, forward = forward_launches(inputs, num_groups, 1e-5, form)
    dy = torch.zeros_like(x)
    *_, backward = backward_launches(inputs, y, statistics, dy, num_groups, form)
    return forward, backward


def passes_of(launches: Iterable[Any], shape: tuple[int, ...]) -> tuple[int, int]:
    """How often launches read and write a tensor of the input's shape."""
    counts = [0, 0]
    for launch in launches:
        names = launch.kernel.arg_names
        written = {"dx_ptr", "dz_ptr", "dresidual_ptr"} if "dy_ptr" in names else {"y_ptr"}
        for name, argument in zip(names, launch.arguments, strict=False):
            if isinstance(argument, Tensor) and argument.shape == shape:
                counts[name in written] += 1
    return counts[0], counts[1]


def traffic_row(case: Case, form: str, dtype: str, layout: str) -> dict[str, Any]:
    """Passes over tensors of x's size, other bytes and programs of one case.

    Bytes are those of one program in the middle of each full-size launch, times the programs.
    """
    directions = launches_of(case.shape, FORMS[form], DTYPES[dtype], LAYOUTS[layout], "cpu")
    row = {
        "site": case.name,
        "shape": "×".join(map(str, case.shape)),
        "dtype": dtype,
        "layout": layout,
    }
    tensor_bytes = torch.Size(case.shape).numel() * DTYPES[dtype].itemsize
    for direction, launches in zip(("forward", "backward"), directions, strict=True):
        reads, writes, other, sectors_used = _count(launches, case.shape)
        row |= {
            f"{direction} programs": max(launch.num_programs for launch in launches),
            f"{direction} launches": len(launches),
            f"{direction} passes": f"{reads}R+{writes}W",
            f"{direction} other": f"{100 * other / ((reads + writes) * tensor_bytes):.1f}%",
            f"{direction} sectors": f"{100 * sectors_used:.0f}%",
        }
    return row


def _count(launches: Iterable[Any], shape: tuple[int, ...]) -> tuple[int, int, int, float]:
    """Reads and writes of whole tensors, bytes of all else, and the share of sectors used."""
    from gn_det.studies.kernels.traffic import SECTOR_BYTES, count_traffic

    reads = writes = other = 0
    sectors_used = 1.0
    for launch in launches:
        traffic = count_traffic(launch, [launch.num_programs // 2])
        arguments = zip(launch.kernel.arg_names, launch.arguments, strict=False)
        whole = [name for name, a in arguments if isinstance(a, Tensor) and a.shape == shape]
        reads += sum(name in traffic.loads for name in whole)
        writes += sum(name in traffic.stores for name in whole)
        for accesses in (traffic.loads, traffic.stores):
            for name, access in accesses.items():
                if name in whole:
                    used = access.bytes / (access.sectors * SECTOR_BYTES)
                    sectors_used = min(sectors_used, used)
                else:
                    other += access.bytes * launch.num_programs
    return reads, writes, other, sectors_used


def code_rows(cases: Iterable[Case], form: str, dtype: str, layout: str) -> list[dict[str, Any]]:
    """Registers, spills and widths of memory accesses of each different kernel, per target."""
    from gn_det.studies.kernels.machine_code import TARGETS, compile_launch

    rows = {}
    for case in cases:
        for launches in launches_of(case.shape, FORMS[form], DTYPES[dtype], LAYOUTS[layout]):
            for launch in launches:
                key = (launch.kernel.__name__, *launch.constants.items(), launch.num_threads)
                if key in rows:
                    rows[key]["sites"] += f", {case.name}"
                    continue
                codes = {target: compile_launch(launch, target) for target in TARGETS}
                sm_90 = codes["sm_90"]
                rows[key] = {
                    "kernel": launch.kernel.__name__,
                    "dtype": dtype,
                    "layout": layout,
                    "sites": case.name,
                    "threads": launch.num_threads,
                    **{target: code.registers for target, code in codes.items()},
                    "spills": sum(code.spill_bytes for code in codes.values()),
                    "atomics": sum(code.atomics for code in codes.values()),
                    "divisions": max(code.divisions for code in codes.values()),
                    "loads": _widths(sm_90.loads),
                    "stores": _widths(sm_90.stores),
                }
    return list(rows.values())


def _widths(counts: dict[int, int]) -> str:
    return " ".join(f"{counts[width]}×{width}" for width in sorted(counts, reverse=True))


ACCURACY_INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": lambda x: x,
    "mean 1e4 σ": lambda x: x + 1e4,
    "σ 1e-6": lambda x: x * 1e-6,
    "constant": lambda x: torch.full_like(x, 3.7),
}


def accuracy_rows(shape: tuple[int, ...] = (2, 16, 40, 48), num_groups: int = 4) -> list[dict]:
    """Largest error against float64 of y, dx, dγ and dβ for GN+ReLU, beside ATen's float32.

    Errors are in ulp of the largest value of the exact result, or of 1 where that is zero.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name, transform in ACCURACY_INPUTS.items():
        generator = torch.Generator().manual_seed(0)
        x, dy = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
        x = transform(x)
        parameters = [torch.randn(shape[1], generator=generator).to(device) for _ in range(2)]
        exact = _results(group_norm_reference, x, num_groups, parameters, dy)
        ours = _results(group_norm, x, num_groups, parameters, dy)
        aten = _results(F.group_norm, x, num_groups, parameters, dy)
        for result, truth, our, their in zip(
            ("y", "dx", "dγ", "dβ"), exact, ours, aten, strict=True
        ):
            ulp = torch.finfo(torch.float32).eps * (truth.abs().max().item() or 1.0)
            rows.append(
                {
                    "input": name,
                    "result": result,
                    "ours, ulp": ((our - truth).abs().max() / ulp).item(),
                    "ATen, ulp": ((their - truth).abs().max() / ulp).item(),
                }
            )
    return rows


def _results(
    function: Callable, x: Tensor, num_groups: int, parameters: list[Tensor], dy: Tensor
) -> list[Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
    y = function(inputs[0], num_groups, *inputs[1:])
    gradients = torch.autograd.grad(y, inputs, dy.to(y.dtype))
    return [tensor.detach().double() for tensor in (y, *gradients)]


def timing_row(
    case: Case, form: str, dtype: str, layout: str, device: str = "cuda"
) -> dict[str, Any]:
    """Milliseconds, GB/s and share of copy bandwidth on the GPU, ours beside the others'.

    All take turns, ROUNDS times, so that a drift of the clock meets all alike; medians.

    Raises:
        ArithmeticError: a result on the device is wrong; there is no time to be had for that.
    """
    check_row(case, form, dtype, layout, device)
    arguments = _arguments(case, FORMS[form], DTYPES[dtype], LAYOUTS[layout], device)
    x, dy = arguments["x"], torch.randn_like(arguments["x"])
    inputs = [a for a in arguments.values() if isinstance(a, Tensor)]
    tensor_bytes = x.numel() * x.element_size()
    copied = torch.empty_like(x)
    directions = launches_of(case.shape, FORMS[form], DTYPES[dtype], LAYOUTS[layout])
    passes = [sum(passes_of(launches, case.shape)) for launches in directions]

    row: dict[str, Any] = {"site": case.name, "dtype": dtype, "layout": layout}
    torch.compiler.reset()  # each row has a static graph of its own
    functions = {"ours": group_norm, "ATen": _unfused}
    if dtype != "fp32":
        functions["ATen, autocast"] = _unfused_autocast
    functions["compiled ATen"] = torch.compile(_unfused_autocast, dynamic=False)
    functions |= installed_peers(arguments)
    timed: dict[str, Callable[[], Any]] = {"copy": lambda: copied.copy_(x.detach())}
    for name, function in functions.items():
        # The backward pass runs many times, so it must not use up what is saved for it.
        with torch._functorch.config.patch(donated_buffer=False):
            y = function(**arguments)
        timed[f"{name} forward"] = partial(function, **arguments)
        timed[f"{name} backward"] = partial(
            torch.autograd.grad, y, inputs, dy.to(y.dtype), retain_graph=True
        )
    times = _in_turns(timed)
    copy_bandwidth = 2 * tensor_bytes / times.pop("copy")
    for name, milliseconds in times.items():
        row[f"{name} ms"] = milliseconds
    for direction, count in zip(("forward", "backward"), passes, strict=True):
        bandwidth = count * tensor_bytes / times[f"ours {direction}"]
        row[f"{direction} GB/s"] = bandwidth / 1e6
        row[f"{direction} of copy"] = f"{100 * bandwidth / copy_bandwidth:.0f}%"
    return row


def check_row(
    case: Case, form: str, dtype: str, layout: str, device: str = "cuda"
) -> dict[str, Any]:
    """The largest error of ours against float64 on a device, of its result's largest value.

    Raises:
        ArithmeticError: it is larger than rounding explains.
    """
    arguments = _arguments(case, FORMS[form], CHECKED_DTYPES[dtype], LAYOUTS[layout], device)
    error = _check_on_device(case, arguments, torch.randn_like(arguments["x"]))
    return {"form": form, "shape": case.name, "dtype": dtype, "layout": layout, "error": error}


def _in_turns(functions: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median milliseconds of each."""
    for function in functions.values():
        function()  # compiled by now
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name] += _milliseconds(function)
    return {name: statistics.median(found) for name, found in times.items()}


def _milliseconds(function: Callable[[], Any]) -> list[float]:
    """What the GPU takes for some calls, each with nothing of its inputs in the cache.

    The GPU is kept busy before each, longer than the host takes to queue the call: what is timed is
    the work of the GPU, and not how long it waits for Python.
    """
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    moments = []
    for _ in range(CALLS):
        for _ in range(BUSY_FILLS):
            cache.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        moments.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in moments]


def _arguments(
    case: Case, form: Form, dtype: torch.dtype, layout: torch.memory_format, device: str
) -> dict[str, Any]:
    """Keyword arguments of group_norm that require gradients."""

    def tensor() -> Tensor:
        x = torch.randn(case.shape, dtype=dtype, device=device).contiguous(memory_format=layout)
        return x.requires_grad_()

    def parameter() -> Tensor:
        return torch.randn(case.shape[1], device=device).requires_grad_()

    arguments = {"x": tensor(), "num_groups": NUM_GROUPS, "weight": parameter()}
    arguments |= {"bias": parameter(), "activation": "relu" if form.relu else None}
    if form.add:
        arguments["residual"] = tensor()
    if form.normalize_add:
        arguments |= {"normalize_residual": True, "residual_weight": parameter()}
        arguments["residual_bias"] = parameter()
    return arguments


def _unfused(x: Tensor, **arguments: Any) -> Tensor:
    """The same out of PyTorch's own layers, in the dtype of x."""
    parameters = ("weight", "bias", "residual_weight", "residual_bias")
    cast = {name: arguments[name].to(x.dtype) for name in parameters if name in arguments}
    return _composed(x, **(arguments | cast))


def _unfused_autocast(x: Tensor, **arguments: Any) -> Tensor:
    """The same, as models write it, under autocast in bfloat16."""
    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != torch.float32):
        return _composed(x, **arguments)


def _composed(
    x: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    activation: str | None,
    residual: Tensor | None = None,
    normalize_residual: bool = False,
    residual_weight: Tensor | None = None,
    residual_bias: Tensor | None = None,
) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias)
    if normalize_residual:
        y = y + F.group_norm(residual, num_groups, residual_weight, residual_bias)
    elif residual is not None:
        y = y + residual
    return F.relu(y) if activation else y


def _check_on_device(case: Case, arguments: dict[str, Any], dy: Tensor) -> float:
    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    inputs = list(tensors.values())
    y = group_norm(**arguments)
    results = (y, *torch.autograd.grad(y, inputs, dy))
    exact = group_norm_reference(**arguments)
    # The mask of what was rounded: at a value that rounds to zero the two differ rightly.
    mask = (y > 0).double() if arguments["activation"] else torch.ones_like(exact)
    linear = group_norm_reference(**(arguments | {"activation": None}))
    truths = (exact, *torch.autograd.grad(linear, inputs, dy.double() * mask))
    tolerance = 2 * torch.finfo(y.dtype).eps
    names = ("y", *(f"the gradient of {name}" for name in tensors))
    largest = 0.0
    for name, result, truth in zip(names, results, truths, strict=True):
        error = ((result - truth).abs().max() / truth.abs().max()).item()
        if not error <= max(tolerance, 1e-5):
            raise ArithmeticError(
                f"{case.name} {case.shape}: {name} is off by {error:.2e} of its largest value, "
                f"more than {max(tolerance, 1e-5):.0e}; no time is reported for a wrong result"
            )
        largest = max(largest, error)
    return largest
