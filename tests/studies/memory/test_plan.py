"""Whether a training step fits on a card, and what is told where it does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from detectron2.config import CfgNode

from gn_det import InputError
from gn_det.config import get_config
from gn_det.studies.memory import plan as memory_plan
from gn_det.studies.memory.plan import (
    MARGIN,
    Card,
    Step,
    advice,
    fixed_table,
    plan,
    plan_table,
    plot_plan,
)
from gn_det.studies.memory.step import VARIANTS, StepMemory

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("8GiB", 8 * GIB), ("7.5 GiB", 15 * GIB // 2), ("8GB", 8 * 10**9), ("512MiB", GIB // 2)],
)
def test_memory_is_read_with_its_unit(text: str, num_bytes: int) -> None:
    assert Card.parse(text).num_bytes == num_bytes


@pytest.mark.parametrize("text", ["8", "GiB", "8 gib", "-1GiB", "0GiB", "1.2.3GiB", "."])
def test_memory_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--gpu-memory .*: give a number and a unit, one of GiB"):
        Card.parse(text)


def memory(activations: int, fixed: int = 0) -> StepMemory:
    return StepMemory({"stem": fixed}, {}, {}, {"res2": activations}, images=0)


def test_a_step_fits_where_it_leaves_the_margin() -> None:
    card = Card(100)
    assert card.fits(memory(50, fixed=int(100 * (1 - MARGIN)) - 50))
    assert not card.fits(memory(50, fixed=int(100 * (1 - MARGIN)) - 49))


@pytest.fixture
def in_gib(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Count a GiB for each image of 100×100, and double in float32 or without recomputation."""
    counted = []

    def count_step(
        cfg: CfgNode, variant: str, num_images: int, image_size: tuple[int, int]
    ) -> StepMemory:
        counted.append(Step(variant, num_images, image_size))
        factor = (1 if variant == VARIANTS[-1] else 2) * (1 if cfg.SOLVER.AMP.ENABLED else 2)
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
def test_the_least_change_that_fits_is_told(gib: float, told: str, in_gib: list[Step]) -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_1x.yaml")
    card = Card(round(gib / (1 - MARGIN) * GIB) + 1)
    sizes = [(50, 80), (100, 100), (40, 80)]
    step = Step("gn_det", 4, (100, 100))
    assert advice(cfg, step, card, sizes) == f"4 images of 100×100: {told}"
    assert not cfg.SOLVER.AMP.ENABLED


def test_what_is_set_already_is_not_advised(in_gib: list[Step]) -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_amp_1x.yaml")
    card = Card(round(2 / (1 - MARGIN) * GIB) + 1)
    told = advice(cfg, Step(VARIANTS[-1], 2, (100, 100)), card, [])
    assert told.endswith(": SOLVER.IMS_PER_GPU 1 SOLVER.ACCUMULATE_STEPS 2 (2.0 GiB)")


def test_tables_and_picture_have_every_step(in_gib: list[Step], tmp_path: Path) -> None:
    cfg = get_config("coco/mask_rcnn_R_50_FPN_gn_amp_1x.yaml")
    steps = plan(cfg, [1, 2], [(100, 100), (100, 200)])
    assert in_gib == list(steps) and len(steps) == 2 * 2 * len(VARIANTS)
    card = Card(5 * GIB)
    rows = plan_table(steps, card, "tsv").splitlines()[-len(steps) :]
    assert [row.split("\t")[-1].strip() for row in rows].count("no") == 3 + 3 + 4
    assert all(row.split("\t")[-2].strip().isdigit() for row in rows)
    assert "stem" in fixed_table(steps[Step("gn_det", 1, (100, 100))])
    plot_plan(steps, card, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
