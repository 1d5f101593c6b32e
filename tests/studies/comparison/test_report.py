"""Tables, CSV and pictures of a comparison."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest

from gn_det.studies.comparison.report import (
    Cost,
    RunResult,
    ap_table,
    cost_table,
    plot_ap,
    plot_cost,
    plot_curves_of,
    results_csv,
)


def reached(recipe: str, ims_per_gpu: int, seed: int, ap: float, failure: str = "") -> RunResult:
    curves = {"segm/AP": {10: ap / 2, 20: ap}, "total_loss": {10: 2.0, 20: 1.0}}
    return RunResult(recipe, ims_per_gpu, seed, ims_per_gpu, failure, curves)


OUTCOMES = [
    reached("bn", 1, 0, 2.0), reached("bn", 1, 1, 4.0), reached("bn", 2, 0, 8.0, "NaN"),
    reached("bn", 2, 1, 9.0), reached("gn", 1, 0, 30.0), reached("gn", 1, 1, 32.0),
    reached("gn", 2, 0, 0.0, "NaN"), reached("gn", 2, 1, 0.0, "disk full"),
]  # fmt: skip
COSTS = [Cost("bn", 1, 10.0, 0.25), Cost("bn", 2, 9.0, 0.2), Cost("gn", 1, 20.0, 0.5)]


def cells(table: str, recipe: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {recipe} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_has_mean_and_sample_deviation_over_the_seeds_that_finished() -> None:
    table = ap_table(OUTCOMES)
    assert cells(table, "bn") == ["bn", "3.0 ± 1.4", "9.0 (1 of 2 finished)"]
    assert cells(table, "gn") == ["gn", "31.0 ± 1.4", "0 of 2 finished"]
    assert "mask AP, 1 image " in table and "mask AP, 2 images" in table and "box" not in table


def test_costs_are_for_each_image() -> None:
    table = cost_table(COSTS)
    assert cells(table, "bn") == ["bn", "10.0", "9.0", "250.0", "200.0"]
    assert cells(table, "gn") == ["gn", "20.0", "", "500.0", ""]


def test_the_csv_has_a_line_for_each_run() -> None:
    lines = results_csv(OUTCOMES).splitlines()
    assert lines[0] == "recipe,ims_per_gpu,seed,ims_per_step,segm/AP,failure"
    assert lines[1] == "bn,1,0,1,2.0000," and lines[-1] == "gn,2,1,2,,disk full"
    assert len(lines) == 1 + len(OUTCOMES)


@pytest.mark.parametrize(
    ("plot", "items"), [(plot_ap, OUTCOMES), (plot_curves_of, OUTCOMES), (plot_cost, COSTS)]
)
def test_pictures_are_written_and_not_blank(plot: object, items: list, tmp_path: Path) -> None:
    plot(items, tmp_path / "plot.png")
    assert cv2.imread(str(tmp_path / "plot.png")).std() > 10
