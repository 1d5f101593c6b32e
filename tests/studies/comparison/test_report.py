"""Tables, CSV and plots of a comparison."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from support.plots import lines_of

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


RESULTS = [
    reached("bn", 1, 0, 2.0), reached("bn", 1, 1, 4.0), reached("bn", 2, 0, 8.0, "NaN"),
    reached("bn", 2, 1, 9.0), reached("gn", 1, 0, 30.0), reached("gn", 1, 1, 32.0),
    reached("gn", 2, 0, 0.0, "NaN"), reached("gn", 2, 1, 0.0, "disk full"),
]  # fmt: skip
COSTS = [Cost("bn", 1, 10.0, 0.25), Cost("bn", 2, 9.0, 0.2), Cost("gn", 1, 20.0, 0.5)]


def cells(table: str, recipe: str) -> list[str]:
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {recipe} ")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_has_mean_and_sample_deviation_over_the_seeds_that_finished() -> None:
    table = ap_table(RESULTS)
    assert cells(table, "bn") == ["bn", "3.0 ± 1.4", "9.0 (1 of 2 finished)"]
    assert cells(table, "gn") == ["gn", "31.0 ± 1.4", "0 of 2 finished"]
    assert "mask AP, 1 image " in table and "mask AP, 2 images" in table and "box" not in table


def test_costs_are_for_each_image() -> None:
    table = cost_table(COSTS)
    assert cells(table, "bn") == ["bn", "10.0", "9.0", "250.0", "200.0"]
    assert cells(table, "gn") == ["gn", "20.0", "", "500.0", ""]


def test_the_csv_has_a_line_for_each_run() -> None:
    lines = results_csv(RESULTS).splitlines()
    assert lines[0] == "recipe,ims_per_gpu,seed,ims_per_step,segm/AP,failure"
    assert lines[1] == "bn,1,0,1,2.0000," and lines[-1] == "gn,2,1,2,,disk full"
    assert len(lines) == 1 + len(RESULTS)


def test_ap_is_drawn_against_images_per_step(tmp_path: Path, figures: list[Figure]) -> None:
    plot_ap(RESULTS, tmp_path / "ap.png", beside=["gn"])
    (axes,) = figures[0].axes
    assert axes.get_ylabel() == "mask AP" and axes.get_xlabel() == "images per step"
    means = {bars.get_label(): [*bars.lines[0].get_ydata()] for bars in axes.containers}
    assert means == {"bn": [3.0, 9.0], "gn": [31.0]}
    assert [bars.lines[0].get_linestyle() for bars in axes.containers] == ["-", "--"]


def test_curves_are_means_over_the_seeds(tmp_path: Path, figures: list[Figure]) -> None:
    plot_curves_of(RESULTS, tmp_path / "curves.png")
    assert [axes.get_title() for axes in figures[0].axes] == ["1 image per GPU"] * 2 + [
        "2 images per GPU"
    ] * 2
    assert lines_of(figures[0].axes[0])["bn"] == [(10, 1.5), (20, 3.0)]
    assert lines_of(figures[0].axes[1])["gn"] == [(10, 2.0), (20, 1.0)]


def test_costs_are_bars(tmp_path: Path, figures: list[Figure]) -> None:
    plot_cost(COSTS, tmp_path / "cost.png")
    memory, time = figures[0].axes
    assert [[bar.get_height() for bar in bars] for bars in memory.containers] == [[10, 20], [9, 0]]
    assert [bar.get_height() for bar in time.containers[0]] == [250, 500]
