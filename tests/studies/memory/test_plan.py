"""Whether a training step fits on a gpu, and what is told where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from matplotlib.axes import Axes

from gn_det import InputError
from gn_det.config import get_config
from gn_det.studies.memory import plan as memory_plan
from gn_det.studies.memory.plan import (
    MARGIN,
    GpuMemory,
    PlannedStep,
    advice,
    fixed_table,
    plan,
    plan_table,
    plot_plan,
)
from gn_det.studies.memory.step import RECOMPUTE, VARIANTS, StepMemory

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 * GIB), ("7.5 GiB", 15 * GIB // 2), ("8GB", 8 * 10**9), ("512MiB", GIB // 2)],
)
def test_memory_is_read_with_its_unit(text: str, num_bytes: int) -> None:
    assert GpuMemory.parse(text).num_bytes == num_bytes


@pytest.mark.parametrize("text", ["8", "GiB", "8 gib", "-1GiB", "0GiB", "1.2.3GiB", "."])
def test_memory_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--gpu-memory .*: give a number and a unit, one of GiB"):
        GpuMemory.parse(text)


def memory(activations: int, fixed: int = 0) -> StepMemory:
    return StepMemory({"stem": fixed}, {}, {}, {"res2": activations}, images=0)


def test_a_step_fits_where_it_leaves_the_margin() -> None:
    gpu = GpuMemory(100)
    assert gpu.fits(memory(50, fixed=int(100 * (1 - MARGIN)) - 50))
    assert not gpu.fits(memory(50, fixed=int(100 * (1 - MARGIN)) - 49))


@pytest.fixture
def in_gib(monkeypatch: pytest.MonkeyPatch) -> list[PlannedStep]:
    """Count a GiB for each image of 100×100, and double in float32 or without recomputation."""
    counted = []

    def count_step(
        cfg: CfgNode, variant: str, num_images: int, image_size: tuple[int, int]
    ) -> StepMemory:
        counted.append(PlannedStep(variant, num_images, image_size))
        factor = (1 if variant == RECOMPUTE else 2) * (1 if cfg.SOLVER.AMP.ENABLED else 2)
        pixels = image_size[0] * image_size[1]
        return memory(factor * num_images * pixels * GIB // 10_000, fixed=GIB)

    monkeypatch.setattr(memory_plan, "count_step", count_step)
    return counted


@pytest.mark.parametrize(
    ("gib", "told"),
    [
        (9, "MODEL.GN.RECOMPUTE True (9.0 GiB)"),
        (5, "MODEL.GN.RECOMPUTE True SOLVER.AMP.ENABLED True (5.0 GiB)"),
        (
            3,
            "MODEL.GN.RECOMPUTE True SOLVER.AMP.ENABLED True SOLVER.IMS_PER_GPU 2 "
            "SOLVER.ACCUMULATE_STEPS 2 (3.0 GiB)",
        ),
        (
            1.5,
            "MODEL.GN.RECOMPUTE True SOLVER.AMP.ENABLED True SOLVER.IMS_PER_GPU 1 "
            "SOLVER.ACCUMULATE_STEPS 4 INPUT.MIN_SIZE_TRAIN '(50,)' INPUT.MAX_SIZE_TRAIN 80 "
            "(1.4 GiB)",
        ),
        (1.1, "no change that was tried is enough; without any activations it is 1.0 GiB"),
    ],
)
def test_the_least_change_that_fits_is_told(
    gib: float, told: str, in_gib: list[PlannedStep]
) -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_1x.yaml")
    gpu = GpuMemory(round(gib / (1 - MARGIN) * GIB) + 1)
    sizes = [(50, 80), (100, 100), (40, 80)]
    step = PlannedStep("gn_det", 4, (100, 100))
    assert advice(cfg, step, gpu, sizes) == f"4 images of 100×100: {told}"
    assert not cfg.SOLVER.AMP.ENABLED


def test_what_is_set_already_is_not_advised(in_gib: list[PlannedStep]) -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_amp_1x.yaml")
    gpu = GpuMemory(round(2 / (1 - MARGIN) * GIB) + 1)
    told = advice(cfg, PlannedStep(RECOMPUTE, 2, (100, 100)), gpu, [])
    assert told.endswith(": SOLVER.IMS_PER_GPU 1 SOLVER.ACCUMULATE_STEPS 2 (2.0 GiB)")


def test_the_tables_have_every_step(in_gib: list[PlannedStep]) -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_amp_1x.yaml")
    steps = plan(cfg, [1, 2], [(100, 100), (100, 200)])
    assert in_gib == list(steps) and len(steps) == 2 * 2 * len(VARIANTS)
    gpu = GpuMemory(5 * GIB)
    rows = plan_table(steps, gpu, "tsv").splitlines()[-len(steps) :]
    assert [row.split("\t")[-1].strip() for row in rows].count("no") == 3 + 3 + 4
    assert all(row.split("\t")[-2].strip().isdigit() for row in rows)
    assert "stem" in fixed_table(steps[PlannedStep("gn_det", 1, (100, 100))])


def test_the_plot_has_a_bar_for_every_step_as_high_as_the_step_needs(
    in_gib: list[PlannedStep], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = []
    monkeypatch.setattr(memory_plan, "save_figure", lambda figure, png: figures.append(figure))
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_amp_1x.yaml")
    steps = plan(cfg, [1, 2], [(100, 100), (100, 200)])
    plot_plan(steps, GpuMemory(5 * GIB), tmp_path / "plan.png")
    axes = figures[0].axes
    assert [each.get_title() for each in axes] == [
        "1 image of 100×100", "2 images of 100×100", "1 image of 100×200", "2 images of 100×200",
    ]  # fmt: skip
    for each in axes:
        assert [line.get_ydata()[0] for line in each.get_lines()] == [5, 5 * (1 - MARGIN)]
    assert [label.get_text() for label in axes[-1].get_xticklabels()] == list(VARIANTS)
    # A bar of each variant, stacked from the fixed part, the ResNet's activations and the rest.
    assert heights(axes[0]) == pytest.approx([3, 3, 3, 2])
    assert heights(axes[3]) == pytest.approx([9, 9, 9, 5])


def heights(axes: Axes) -> list[float]:
    """Of the stacks of bars from left to right."""
    bars = [[bar.get_height() for bar in stacked] for stacked in axes.containers]
    return [sum(stack) for stack in zip(*bars, strict=True)]
