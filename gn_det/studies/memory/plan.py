"""Whether training fits on a GPU, and what to change: tables and plot of counted steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from gn_det.errors import InputError
from gn_det.plots.figures import new_figure, save_figure
from gn_det.studies.memory.step import RECOMPUTE, VARIANTS, StepMemory, count_step
from gn_det.text import table

__all__ = [
    "MARGIN",
    "GpuMemory",
    "PlannedStep",
    "advice",
    "fixed_table",
    "plan",
    "plan_table",
    "plot_plan",
]

# Of a GPU, for what is not counted. In Detectron2's model zoo Mask R-CNN R-50-FPN takes 3.4 GB
# (frozen BN) and 5.6 GB (GN) for two images; counted are 2.6 and 4.7 GB.
MARGIN = 0.25

_UNITS = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6}
_MIB = 2**20
_GIB = 2**30


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's memory in bytes, MARGIN of which is left for what is not counted."""

    num_bytes: int

    @classmethod
    def parse(cls, text: str) -> GpuMemory:
        """Read such as "8GiB".

        Raises:
            InputError: it is not a positive number and a unit.
        """
        match = re.fullmatch(r"([\d.]+)\s*(\w+)", text.strip())
        if not match or match[2] not in _UNITS or not _is_positive(match[1]):
            raise InputError(
                f"--gpu-memory {text}: give a number and a unit, one of {', '.join(_UNITS)}"
            )
        return cls(int(float(match[1]) * _UNITS[match[2]]))

    @property
    def usable(self) -> float:
        """Bytes for what is counted."""
        return (1 - MARGIN) * self.num_bytes

    def fits(self, memory: StepMemory) -> bool:
        """Whether a training step does."""
        return memory.total <= self.usable


@dataclass(frozen=True)
class PlannedStep:
    """A training step that is planned.

    Attributes:
        variant: of gn_det.studies.memory.step.VARIANTS.
        num_images: in the batch.
        image_size: (height, width).
    """

    variant: str
    num_images: int
    image_size: tuple[int, int]

    @property
    def name(self) -> str:
        images = "1 image" if self.num_images == 1 else f"{self.num_images} images"
        return f"{images} of {_size(self.image_size)}"


def plan(
    cfg: CfgNode, images: Sequence[int], sizes: Sequence[tuple[int, int]]
) -> dict[PlannedStep, StepMemory]:
    """Count every step: each number of images, in each size, of each variant.

    Raises:
        InputError: see :func:`count_step`.
    """
    steps = [PlannedStep(v, n, size) for size in sizes for n in images for v in VARIANTS]
    progress = tqdm(steps, desc="counting", unit="step", delay=2)
    return {
        step: count_step(cfg, step.variant, step.num_images, step.image_size) for step in progress
    }


def plan_table(
    steps: dict[PlannedStep, StepMemory], gpu: GpuMemory, tablefmt: str = "simple"
) -> str:
    """Activations by part of the model, what else there is, and whether it fits, in MiB."""
    parts = list(dict.fromkeys(part for memory in steps.values() for part in memory.activations))
    headers = ["images", "size", "", *parts, "all activations", "with the rest", "fits"]
    rows = [
        [
            step.num_images,
            _size(step.image_size),
            step.variant,
            *(_mib(memory.activations.get(part, 0)) for part in parts),
            _mib(memory.kept),
            _mib(memory.total),
            "yes" if gpu.fits(memory) else "no",
        ]
        for step, memory in steps.items()
    ]
    return table(rows, headers, tablefmt=tablefmt, maxheadercolwidths=11)


def fixed_table(memory: StepMemory) -> str:
    """Parameters, gradients and momentum by part of the model, in MiB."""
    kinds = (memory.parameters, memory.gradients, memory.momentum)
    rows = [[part, *(_mib(kind.get(part, 0)) for kind in kinds)] for part in memory.parameters]
    rows.append(["in all", *(_mib(sum(kind.values())) for kind in kinds)])
    return table(rows, ["", "parameters", "gradients", "momentum"])


def advice(
    cfg: CfgNode, step: PlannedStep, gpu: GpuMemory, sizes: Sequence[tuple[int, int]]
) -> str:
    """The least to change so that a step fits, as config keys; the changes are counted.

    In this order, each on top of those before: MODEL.GN.RECOMPUTE, mixed precision, fewer images at
    a time with as many in a step, smaller images.

    Args:
        cfg: the config.
        step: that does not fit, with GN of ours.
        gpu: what it has to fit on.
        sizes: of images that may be tried.
    """
    keys: list[str] = []
    cfg = cfg.clone()
    cfg.defrost()
    if step.variant != RECOMPUTE:
        keys.append("MODEL.GN.RECOMPUTE True")
        if gpu.fits(memory := _counted(cfg, step)):
            return _told(step, keys, memory)
    if not cfg.SOLVER.AMP.ENABLED:
        keys.append("SOLVER.AMP.ENABLED True")
        cfg.SOLVER.AMP.ENABLED = True
        if gpu.fits(memory := _counted(cfg, step)):
            return _told(step, keys, memory)
    fewer = [n for n in range(step.num_images - 1, 0, -1) if step.num_images % n == 0]
    for n in fewer:
        accumulated = [f"SOLVER.IMS_PER_GPU {n}", f"SOLVER.ACCUMULATE_STEPS {step.num_images // n}"]
        if gpu.fits(memory := _counted(cfg, step, num_images=n)):
            return _told(step, keys + accumulated, memory)
    if fewer:
        keys += accumulated
    smaller = [
        size for size in sizes if size[0] * size[1] < step.image_size[0] * step.image_size[1]
    ]
    for height, width in sorted(smaller, reverse=True):
        if gpu.fits(memory := _counted(cfg, step, num_images=1, image_size=(height, width))):
            shrunk = [f"INPUT.MIN_SIZE_TRAIN '({height},)'", f"INPUT.MAX_SIZE_TRAIN {width}"]
            return _told(step, keys + shrunk, memory)
    memory = _counted(cfg, step, num_images=1)
    return (
        f"{step.name}: no change that was tried is enough; without any activations it is "
        f"{(memory.total - memory.kept) / _GIB:.1f} GiB"
    )


def plot_plan(steps: dict[PlannedStep, StepMemory], gpu: GpuMemory, png: Path) -> None:
    """Bars of every step, stacked by what is in them, with the GPU's memory as a line."""
    images = list(dict.fromkeys(step.num_images for step in steps))
    sizes = list(dict.fromkeys(step.image_size for step in steps))
    figure = new_figure(3.6 * len(images) + 1.5, 2.6 * len(sizes) + 1.4)
    grid = figure.subplots(len(sizes), len(images), sharex=True, sharey=True, squeeze=False)
    for axes, (size, n) in zip(
        grid.flat, ((size, n) for size in sizes for n in images), strict=True
    ):
        memories = [steps[PlannedStep(variant, n, size)] for variant in VARIANTS]
        bottom = [0.0] * len(memories)
        for label, values in _stacked(memories).items():
            axes.bar(range(len(memories)), values, 0.7, bottom, label=label)
            bottom = [b + v for b, v in zip(bottom, values, strict=True)]
        for place, (memory, top) in enumerate(zip(memories, bottom, strict=True)):
            fits = gpu.fits(memory)
            axes.annotate(
                f"{top:.1f}\n{'yes' if fits else 'no'}", (place, top), (0, 3),
                textcoords="offset points", ha="center", va="bottom", fontsize=8,
                color="tab:green" if fits else "tab:red",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            )  # fmt: skip
        axes.axhline(gpu.num_bytes / _GIB, color="black", linewidth=1)
        axes.axhline(gpu.usable / _GIB, color="black", linewidth=1, linestyle="--")
        axes.set_title(PlannedStep("", n, size).name, fontsize=9)
        axes.set_xticks(range(len(VARIANTS)), VARIANTS, rotation=25, ha="right", fontsize=8)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    top = max(gpu.num_bytes, *(memory.total for memory in steps.values())) / _GIB
    axes.set_ylim(0, 1.18 * top)
    for row in grid:
        row[0].set_ylabel("GiB")
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8
    )
    figure.suptitle(
        f"A training step on {gpu.num_bytes / _GIB:.3g} GiB (line); "
        f"{100 * MARGIN:.0f}% are left for what is not counted (dashed)",
        fontsize=10,
    )
    save_figure(figure, png)


def _stacked(memories: Sequence[StepMemory]) -> dict[str, list[float]]:
    """GiB by what is in a bar, from the bottom."""
    return {
        "parameters, gradients, momentum, images": [(m.fixed + m.images) / _GIB for m in memories],
        "activations: ResNet": [m.resnet / _GIB for m in memories],
        "activations: the rest": [(m.kept - m.resnet) / _GIB for m in memories],
    }


def _counted(
    cfg: CfgNode,
    step: PlannedStep,
    num_images: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> StepMemory:
    """The step with recomputation."""
    return count_step(cfg, RECOMPUTE, num_images or step.num_images, image_size or step.image_size)


def _told(step: PlannedStep, keys: Sequence[str], memory: StepMemory) -> str:
    return f"{step.name}: {' '.join(keys)} ({memory.total / _GIB:.1f} GiB)"


def _is_positive(number: str) -> bool:
    try:
        return float(number) > 0
    except ValueError:
        return False


def _size(image_size: tuple[int, int]) -> str:
    return "×".join(map(str, image_size))


def _mib(num_bytes: int) -> int:
    return round(num_bytes / _MIB)
