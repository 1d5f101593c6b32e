"""A section's figures, faults and what it left out."""

from __future__ import annotations

import pytest
import torch

from gn_det.studies.gpu.report import has_failed, write_report
from gn_det.studies.gpu.section import LeftOut, Section


def raising(error: BaseException) -> object:
    def measure() -> None:
        raise error

    return measure


@pytest.mark.parametrize(
    ("error", "fault", "left_out"),
    [
        (ArithmeticError("y is off"), ["it: ArithmeticError: y is off"], []),
        (RuntimeError("two\nlines"), ["it: RuntimeError: two"], []),
        (LeftOut("apex is not installed"), [], ["it: apex is not installed"]),
        (torch.OutOfMemoryError("8 GiB"), [], ["it: does not fit into the memory of this card"]),
    ],
)
def test_an_error_is_a_fault_unless_it_says_that_it_could_not_be_done_here(
    error: Exception, fault: list, left_out: list
) -> None:
    section = Section("Section", 60)
    section.check("it", raising(error))
    section.check("more", lambda: {"ms": 1.0})
    assert (section.faults, section.left_out, section.rows) == (fault, left_out, [{"ms": 1.0}])
    assert has_failed({"section": section}) == bool(fault)


def test_an_interruption_ends_the_program() -> None:
    with pytest.raises(KeyboardInterrupt):
        Section("Section", 60).check("it", raising(KeyboardInterrupt()))


def test_nothing_begins_after_the_budget() -> None:
    section = Section("Section", -1)
    section.check("it", raising(AssertionError("it began")))
    assert section.left_out == ["it: the -1 s of this section were over"] and not section.faults


def test_cells_of_rows_with_other_columns_stay_empty(tmp_path) -> None:
    section = Section("Section", 60)
    for row in ({"name": "a|b", "ms": 1.23456}, {"name": "c", "apex ms": float("nan")}):
        section.check("it", lambda row=row: row)
    write_report(tmp_path, {"card": "<none>"}, {"section": section})
    page = (tmp_path / "report.md").read_text()
    assert "| name | ms | apex ms |\n| --- | --- | --- |\n| a&#124;b | 1.23 |  |" in page
    assert "- card: &#60;none>" in page
    assert '"apex ms": null' in (tmp_path / "report.json").read_text()
