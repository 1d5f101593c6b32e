"""What was found is a table with counts and examples, and what is refused one line."""

from __future__ import annotations

import pytest

from gn_det import InputError
from gn_det.data.coco import Findings
from gn_det.data.coco.findings import shown


def test_the_table_has_a_row_for_each_kind_with_its_count_and_first_places() -> None:
    findings = Findings("x.json")
    for number in range(1, 6):
        findings.add("warned", "boxes are odd", f"annotation {number}", [number, 0])
    findings.add("dropped", "masks are empty", "annotation 9")
    findings.add("mended", "areas", "annotation 7", None)
    rows = [line.split() for line in findings.table().splitlines()[2:]]
    assert [row[:2] for row in rows] == [["mended", "1"], ["dropped", "1"], ["warned", "5"]]
    assert "annotation 1: [1, 0]; also 2, 3 and 2 more" in findings.table()
    assert findings.count("mended", "dropped") == 2 and findings.changed


def test_nothing_found_is_no_table() -> None:
    findings = Findings("x.json")
    findings.check()
    assert findings.table() == "" and not findings.changed


def test_warnings_alone_change_nothing() -> None:
    findings = Findings("x.json")
    findings.add("warned", "boxes are odd", "annotation 1")
    findings.check()
    assert not findings.changed


def test_what_is_refused_is_one_printable_line() -> None:
    findings = Findings("x.json")
    findings.add("refused", "ids are names", "image 'a\x1b[2J\n'", "\x1b]0;title\x07\n")
    findings.add("refused", "boxes", "annotation 3", [1, 2], count=4)
    with pytest.raises(InputError, match="1 ids are names .*; 4 boxes") as caught:
        findings.check()
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("value", ["a" * 10_000, list(range(10_000)), {"a": ["b" * 10_000] * 99}])
def test_a_value_is_shown_in_a_few_dozen_characters(value: object) -> None:
    assert len(shown(value)) < 150
