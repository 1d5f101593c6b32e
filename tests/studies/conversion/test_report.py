"""The report of a conversion: tables and picture, with and without a metric."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.plots import lines_of

from gn_det.injection.convert_bn import Calibration, CalibrationRow
from gn_det.studies.conversion.report import (
    conversion_report,
    images_shown,
    level_report,
    plot_conversion,
    plot_distillation,
    stage_table,
)
from gn_det.studies.conversion.stages import Conversion

STAGES = {"BN": 0.9, "copied": 0.3, "calibrated": 0.81234}
FOUND = Calibration(
    (
        CalibrationRow("stem.norm", "backbone", 64, 32, 100, 2, 1.2, 0.6),
        CalibrationRow("res2.norm", "backbone", 64, 32, 100, 0, 1.3, 0.7),
        CalibrationRow("head.norm", "box_head", 64, 32, 0, 0, None, None),
    ),
    passes=2,
    copied=1.25,
    calibrated=0.65,
)


def test_the_stages_are_a_table_in_their_order() -> None:
    lines = stage_table("held-out accuracy", STAGES).splitlines()
    assert "held-out accuracy" in lines[0]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [*STAGES]
    assert "0.8123" in lines[4]


def test_the_report_has_tables_passes_and_picture() -> None:
    text = conversion_report("r18.yaml", "How.", FOUND, "accuracy", STAGES)
    assert text.startswith("# r18.yaml from BN to GN\n\nHow.\n\n## By stage\n")
    assert "by least squares, in 2 passes over the calibration set." in text
    assert "(conversion.png)" in text and FOUND.to_markdown() in text


def test_levels_are_a_table_by_stage_with_the_curve() -> None:
    levels = {"copied": {"res2": 0.9, "a|b": 0.5}, "distilled": {"res2": 0.25, "a|b": 0.4}}
    text = level_report(Conversion(FOUND, {}, levels, (1.0, 0.5)))
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert ["", "res2", "0.900", "0.250", ""] in rows
    assert ["", "a&#124;b", "0.500", "0.400", ""] in rows
    assert "took 2 steps" in text
    assert "(distillation.png)" in text
    assert "distillation.png" not in level_report(Conversion(FOUND, {}, levels))


def test_the_loss_of_each_step_is_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    plot_distillation((1.0, 0.5, 0.4), tmp_path / "distillation.png")
    assert (tmp_path / "distillation.png").exists()
    step, _ = figures[0].axes[0].lines
    assert list(step.get_ydata()) == [1.0, 0.5, 0.4]


def test_without_a_metric_the_report_is_of_the_norms_alone() -> None:
    text = conversion_report("r18.yaml", "How.", FOUND)
    assert "By stage" not in text and "## Error of each norm" in text


@pytest.mark.parametrize("stages", [{}, STAGES], ids=["errors", "errors and stages"])
def test_errors_and_stages_are_drawn(
    stages: dict[str, float], tmp_path: Path, figures: list[Figure]
) -> None:
    plot_conversion(FOUND, tmp_path / "plot.png", "accuracy", stages)
    errors, *more = figures[0].axes
    drawn = lines_of(errors)
    assert drawn["copied"] == [(0, 1.2), (1, 1.3)] and drawn["calibrated"] == [(0, 0.6), (1, 0.7)]
    assert [label.get_text() for label in errors.get_xticklabels()] == ["stem.norm", "res2.norm"]
    assert len(more) == bool(stages)
    if stages:
        assert more[0].get_title() == "accuracy"
        assert [bar.get_height() for bar in more[0].patches] == [*stages.values()]


@pytest.mark.parametrize(
    ("number", "total", "text"),
    [
        (16, 61, "16 training images"),
        (1, 1, "1 training image"),
        (4, 3, "4 training images, some of the 3 twice or more"),
    ],
)
def test_images_that_a_network_saw_are_counted(number: int, total: int, text: str) -> None:
    assert images_shown(number, total) == text
