"""Reading measurements."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_det import InputError
from gn_det.studies.recommendation.measured import MEASURED, read_rows, rows_text


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = read_rows(MEASURED)
    (tmp_path / "measured.csv").write_text(rows_text(rows), encoding="utf-8")
    assert read_rows(tmp_path / "measured.csv") == rows and len(rows) > 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has the columns None"), (b"a,b\n1,2\n", r"has the columns \['a', 'b'\]"),
        (b"\xff\xfe", "cannot be read"),
        (MEASURED.read_bytes().replace(b",61,", b",many,", 1), "pictures is 'many', no int"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_of_measurements_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / "measured.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"measured\.csv.*{message}"):
        read_rows(tmp_path / "measured.csv")
