"""Curves from metrics.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from support.plots import lines_of

from gn_det import InputError
from gn_det.plots.curves import plot_curves, read_metrics


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_what_a_resumed_run_measured_again_replaces_the_earlier_value(tmp_path: Path) -> None:
    metrics = read_metrics(
        write(
            tmp_path / "metrics.json",
            [
                {"iteration": 19, "total_loss": 3.0},
                {"iteration": 39, "total_loss": 2.0, "segm/AP": 1.0},
                {"iteration": 39, "total_loss": 2.5},
            ],
        )
    )
    assert metrics["total_loss"] == {19: 3.0, 39: 2.5}
    assert metrics["segm/AP"] == {39: 1.0}


@pytest.mark.parametrize("with_ap", [True, False])
def test_losses_and_ap_are_drawn_by_iteration(
    tmp_path: Path, with_ap: bool, figures: list[Figure]
) -> None:
    records = [{"iteration": i, "total_loss": 1 / (i + 1), "loss_cls": 0.1} for i in range(4)]
    if with_ap:
        records.append({"iteration": 4, "bbox/AP": 10.0, "segm/AP": 20.0})
    plot_curves(write(tmp_path / "metrics.json", records), tmp_path / "curves.png")
    losses, aps = map(lines_of, figures[0].axes)
    assert losses["total_loss"] == [(0, 1), (1, 1 / 2), (2, 1 / 3), (3, 1 / 4)]
    assert losses["loss_cls"] == [(i, 0.1) for i in range(4)]
    assert aps == ({"box AP": [(4, 10)], "mask AP": [(4, 20)]} if with_ap else {})


@pytest.mark.parametrize("text", ["no json", '{"total_loss": 1}', "[1, 2]", "3"])
def test_a_file_that_holds_no_metrics_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with pytest.raises(InputError, match=r"metrics\.json cannot be read as metrics"):
        read_metrics(tmp_path / "metrics.json")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_metrics(tmp_path / "metrics.json")
