"""Plots of a comparison."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from support.plots import lines_of
from support.results import COSTS, RESULTS, reached

from gn_det.studies.comparison.plots import plot_ap, plot_cost, plot_curves_of, plot_groups


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


def test_groups_are_drawn_beside_each_other_without_those_that_did_not_finish(
    tmp_path: Path, figures: list[Figure]
) -> None:
    groups = {"10 pictures": [reached("bn", 2, 0, 8.0, "NaN")], "all": RESULTS}
    plot_groups(groups, tmp_path / "parts.png")
    one, two = figures[0].axes
    assert [axes.get_title() for axes in (one, two)] == ["1 image per GPU", "2 images per GPU"]
    places = {bars.get_label(): bars.lines[0].get_xydata().tolist() for bars in one.containers}
    assert places == {"bn": [[1, 3.0]], "gn": [[1, 31.0]]}
    (bars,) = [bars for bars in two.containers if bars.get_label() == "bn"]
    assert bars.lines[0].get_xydata().tolist() == [[1, 9.0]]
