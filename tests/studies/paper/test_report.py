"""Tables and figures of a sweep."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.plots import lines_of

from gn_det.studies.paper.report import (
    ClassifierResult,
    describe_degradation,
    error_table,
    plot_error_by_batch,
    plot_error_curves,
    plot_group_errors,
    results_csv,
)

CURVES = {"error/train": {1: 50.0, 2: 10.0}, "error/val": {1: 40.0, 2: 12.0}}


def of(
    norm: str, ims_per_gpu: int, *errors: float, groups: int | None = None
) -> list[ClassifierResult]:
    return [
        ClassifierResult(norm, groups, None, ims_per_gpu, seed, error, error / 2, curves=CURVES)
        for seed, error in enumerate(errors)
    ]


def test_a_norm_that_degrades_is_told_from_one_that_stays() -> None:
    trained = [
        *of("BN", 32, 5.0, 5.2, 4.8), *of("BN", 2, 9.0, 9.4, 8.6),
        *of("GN", 32, 5.0, 5.5, 4.5), *of("GN", 2, 5.1, 5.6, 4.6),
        *of("LN", 32, 9.0, 9.2), *of("LN", 2, 6.0, 6.2),
        *of("IN", 32, 9.0), *of("IN", 2, 6.0),
    ]  # fmt: skip
    bn, gn, ln, instance = describe_degradation(trained).splitlines()
    assert bn == "BN: from 32 to 2 images per step the error changes by +4.0 ± 0.3 points: " + (
        "it degrades."
    )
    assert gn.endswith("+0.1 ± 0.4 points: no more than the seeds make.")
    assert ln.endswith("-3.0 ± 0.1 points: it improves.")
    assert instance == "IN: too few runs finished to say."


def test_the_table_has_mean_deviation_and_what_failed() -> None:
    trained = [
        *of("BN", 32, 5.0, 7.0),
        *of("BN", 2, 9.0),
        ClassifierResult("BN", None, None, 2, 1, failure="diverged"),
    ]
    table = error_table(trained, lambda t: t.norm, lambda t: t.ims_per_gpu, "images per step")
    row = [cell.strip() for cell in table.splitlines()[-1].strip("|").split("|")]
    assert row == ["BN", "6.0 ± 1.4", "9.0 (1 of 2 finished)"]


def test_the_csv_has_a_line_for_each_run() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(of("GN", 4, 5.0, 6.0, groups=8)))))
    assert [(r["norm"], r["num_groups"], r["seed"], r["val_error"]) for r in rows] == [
        ("GN", "8", "0", "5.0"),
        ("GN", "8", "1", "6.0"),
    ]
    assert "curves" not in rows[0]


def test_figures_have_the_means_of_the_runs_that_finished(
    tmp_path: Path, figures: list[Figure]
) -> None:
    failed = ClassifierResult("none", 4, None, 32, 0, failure="diverged")
    trained = [*of("GN", 32, 5.0, 6.0, groups=8), *of("GN", 2, 5.0, groups=16), failed]
    for plot in (plot_error_by_batch, plot_error_curves, plot_group_errors):
        plot(trained, tmp_path / f"{plot.__name__}.png")
    by_batch, curves, groups = ([lines_of(axes) for axes in f.axes] for f in figures)
    assert by_batch[0]["GN"] == [(32, 5.5)] and not by_batch[0].get("none")  # of both seeds
    assert curves[0]["GN"] == [(1, 50.0), (2, 10.0)] and curves[1]["GN"] == [(1, 40.0), (2, 12.0)]
    assert groups[0]["GN"][0] == (8, 5.5)


def test_one_number_of_images_has_nothing_to_compare_with() -> None:
    assert describe_degradation(of("GN", 4, 5.0, 6.0)).startswith(
        "There are 4 images per step only"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_one_seed_has_no_deviation(count: int) -> None:
    table = error_table(of("GN", 4, *[5.0] * count), lambda t: t.norm, lambda t: "", "")
    assert ("±" in table) == (count > 1)
