"""What a call costs the host: everything in Python, PyTorch and Triton up to the driver's launch.

A stub stands in for the driver, so that no GPU is needed: kernels are compiled for one, and each
launch ends where the driver would begin. Tensors are small and on the CPU, where ATen's operators,
which do compute, run beside ours in the same rounds.
"""

from __future__ import annotations

import copy
import gc
import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import GPUDriver
from triton.backends.nvidia import driver as nvidia

from gn_det.ops import group_norm, guarded
from gn_det.ops.backend import kernels_run_on
from gn_det.ops.eager import kinds
from gn_det.ops.form import FORMS, Form
from gn_det.ops.kernels import backward, forward, launch

__all__ = ["StubDriver", "backbone_rows", "call_rows", "kernels_on_stub"]

SHAPE, NUM_GROUPS = (1, 64, 4, 4), 32
PASSES = ("no_grad", "forward", "forward + backward")
ROUNDS, CALLS = 400, 5


class _Utils:
    """Triton's driver module, doing nothing."""

    def __init__(self) -> None:
        self.recording = True
        self.launches: list[tuple[Any, ...]] = []

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads at most

    def unload_module(self, *_: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}  # an H100's

    def build_signature_metadata(self, signature: Any) -> bytes:
        return b""

    def launch(self, *arguments: Any) -> None:
        if self.recording:
            self.launches.append(arguments)


class _Launcher:
    """In place of the one that older Triton compiles for each kernel."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, *arguments: Any) -> None:
        triton.runtime.driver.active.utils.launch(*arguments)


class StubDriver(GPUDriver):
    """The driver of one H100 that takes launches and runs none, behind Triton's own launcher.

    Attributes:
        utils.launches: the arguments of those that it has taken, while utils.recording.
    """

    launcher_cls = nvidia.CudaLauncher if hasattr(nvidia, "PyKernelArg") else _Launcher

    def __init__(self) -> None:
        self.utils = _Utils()
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return nvidia.ty_to_cpp(ty)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable:
        raise NotImplementedError


@contextmanager
def kernels_on_stub() -> Iterator[StubDriver]:
    """Have tensors on the CPU go to the kernels, and their launches to a stub.

    What was compiled before is put aside. Needs Triton 3.3 or newer, and a process in which kernels
    are not interpreted.
    """
    driver = StubDriver()
    # The function hides its module of the same name from attribute access.
    operator = importlib.import_module("gn_det.ops.group_norm")
    configured = triton.runtime.driver
    names = [(module, name) for module in (forward, backward) for name in module.__all__]
    kernels = [getattr(module, name) for module, name in names]
    caches = [defaultdict(kernel.create_binder) for kernel in kernels]
    with ExitStack() as stack:
        stack.callback(setattr, configured, "_active", configured._active)
        configured.set_active(driver)
        stack.callback(_forget, caches)
        for patch in (
            *(
                mock.patch.object(kernel, "device_caches", cache)
                for kernel, cache in zip(kernels, caches, strict=True)
            ),
            mock.patch.dict(kinds, clear=True),
            mock.patch.dict(guarded._verdicts, clear=True),
            mock.patch.object(operator, "kernels_run_on", lambda _: kernels_run_on("cuda")),
            mock.patch.object(nvidia, "PyKernelArg", lambda **_: None, create=True),
        ):
            stack.enter_context(patch)
        yield driver


def _forget(caches: list[Any]) -> None:
    """Have compiled kernels not unload themselves from a driver that is gone."""
    for cache in caches:
        for compiled, *_ in cache.values():
            for kernel in compiled.values():
                kernel.module = None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One thread, no garbage collection, as timeit has it, and no denormals, which are slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def call_rows(
    forms: tuple[str, ...] = ("GN+ReLU", "GN+add+ReLU"), rounds: int = ROUNDS
) -> list[dict[str, Any]]:
    """Microseconds of a call on one thread: ATen's, ours without launches, ours up to the driver.

    Medians over rounds, in which each of the three is called CALLS times.
    """
    with kernels_on_stub() as driver, _undisturbed():
        driver.utils.recording = False
        return [
            {"form": form, "pass": name} | _times(FORMS[form], name, rounds)
            for form in forms
            for name in PASSES
        ]


def _times(form: Form, name: str, rounds: int) -> dict[str, float]:
    shapes = [SHAPE, SHAPE[1:2], SHAPE[1:2]] + [SHAPE] * form.add
    inputs = [torch.randn(shape).requires_grad_(name != "no_grad") for shape in shapes]
    dy = torch.ones(SHAPE)

    def called(function: Callable[..., Tensor]) -> Callable[[], object]:
        if name == "forward + backward":
            return lambda: torch.autograd.grad(function(*inputs), inputs, dy)
        return lambda: function(*inputs)

    ours, aten = (_ours_add, _aten_add) if form.add else (_ours, _aten)
    contestants = {
        "ATen µs": (called(aten), nullcontext()),
        "no launches µs": (called(ours), mock.patch.object(launch, "run", lambda *_: None)),
        "to the driver µs": (called(ours), nullcontext()),
    }
    times: dict[str, list[float]] = {column: [] for column in contestants}
    with torch.set_grad_enabled(name != "no_grad"):
        for _ in range(rounds + 1):  # the first compiles
            for column, (function, context) in contestants.items():
                with context:
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        function()
                    times[column].append((time.perf_counter() - start) / CALLS)
    medians = {column: 1e6 * statistics.median(t[1:]) for column, t in times.items()}
    return medians | {
        f"{column.removesuffix(' µs')} / ATen": microseconds / medians["ATen µs"]
        for column, microseconds in list(medians.items())[1:]
    }


def _ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return group_norm(x, NUM_GROUPS, weight, bias, activation="relu")


def _ours_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return group_norm(x, NUM_GROUPS, weight, bias, activation="relu", residual=residual)


def _aten(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, NUM_GROUPS, weight, bias))


def _aten_add(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return F.relu(F.group_norm(x, NUM_GROUPS, weight, bias) + residual)


def backbone_rows(steps: int = 40) -> list[dict[str, Any]]:
    """Milliseconds of a training step of R-50-FPN on one thread, with Detectron2's GN and ours.

    All of its norms, blocks and FPN levels at an eighth of the width, on one picture of 64×64, so
    that little but the host's work is left. Launches end at the driver, and what was in memory
    stands for their results. The three take turns.
    """
    from detectron2.config import get_cfg
    from detectron2.modeling import build_backbone

    from gn_det.injection import fuse, inject, recompute

    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = cfg.MODEL.FPN.OUT_CHANNELS = 32
    theirs = build_backbone(cfg).train()
    ours = copy.deepcopy(theirs)
    inject(ours)
    fuse(ours)
    models = {
        "Detectron2's GN": theirs,
        "ours": ours,
        "ours, recompute": recompute(copy.deepcopy(ours)),
    }
    x = torch.randn(1, 3, 64, 64)
    times: dict[str, list[float]] = {name: [] for name in models}
    with kernels_on_stub() as driver, _undisturbed():
        driver.utils.recording = False
        for _ in range(steps + 1):  # the first compiles
            for name, model in models.items():
                start = time.perf_counter()
                sum(level.sum() for level in model(x).values()).backward()
                times[name].append(time.perf_counter() - start)
                model.zero_grad()
    medians = {name: 1e3 * statistics.median(t[1:]) for name, t in times.items()}
    return [
        {"norm": name, "ms": ms, "of Detectron2's": ms / medians["Detectron2's GN"]}
        for name, ms in medians.items()
    ]
