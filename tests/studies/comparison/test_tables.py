"""Tables and CSV of a comparison."""

from __future__ import annotations

from support.results import COSTS, RESULTS

from gn_det.studies.comparison.tables import ap_table, cost_table, results_csv


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
