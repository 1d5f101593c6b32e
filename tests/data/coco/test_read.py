"""A file is read in whatever Unicode encoding it is, and refused in one line if it is none."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest

from gn_det import InputError
from gn_det.data.coco import Findings, read_coco

LISTS = '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "Bär"}]}'


@pytest.mark.parametrize(
    ("encoding", "is_mended"),
    [
        ("utf-8", False),
        ("utf-8-sig", True),
        ("utf-16", True),
        ("utf-16-le", True),
        ("utf-16-be", True),
        ("utf-32", True),
    ],
)
def test_unicode_is_read_and_said_if_others_would_not_read_it(
    tmp_path: Path, encoding: str, is_mended: bool
) -> None:
    (tmp_path / "x.json").write_bytes(LISTS.encode(encoding))
    findings = Findings("x.json")
    assert read_coco(tmp_path / "x.json", findings=findings) == json.loads(LISTS)
    assert findings.changed == is_mended
    assert ("another encoding than UTF-8" in findings.table()) == is_mended


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        pytest.param(
            gzip.compress(LISTS.encode()), r"x\.json is a compressed archive; unpack it", id="gzip"
        ),
        pytest.param(lzma.compress(LISTS.encode()), "is a compressed archive", id="xz"),
        (b"{", "is not JSON"),
        (LISTS.encode()[:-3], "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"images": ' + b"9" * 5000 + b"}", "is not JSON"),
        (LISTS.encode("latin-1"), "is not text in UTF-8 or UTF-16: .* at byte 69; save it"),
        (b"[]", "no list 'images'"),
        (b'{"images": [], "annotations": {}, "categories": []}', "no list 'annotations'"),
        (b'{"images": [], "annotations": [], "categories": null}', "no list 'categories'"),
        (b'{"images": [3]}', r"images\[0\] is int, no object"),
    ],
)
def test_what_is_no_coco_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_coco(tmp_path / "x.json")
    assert "x.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"annotations": [{"id": 7, "bbox": [1, 2, float("nan"), 4]}]}, "annotation 7, bbox: nan"),
        ({"annotations": [{"id": 7, "area": float("inf")}]}, "annotation 7, area: inf"),
        ({"annotations": [{"area": float("-inf")}]}, r"annotations\[0\], area: -inf"),
        (
            {"annotations": [{"id": 7, "segmentation": [[1, 2, float("nan")]]}]},
            "annotation 7, segmentation: nan",
        ),
        ({"images": [{"id": 3, "width": float("inf")}]}, "image 3, width: inf"),
        ({"info": {"version": [float("nan")]}}, r"info\[0\], version: nan"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(
    tmp_path: Path, change: dict, place: str
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({**json.loads(LISTS), **change}))
    with pytest.raises(InputError, match=rf"1 numbers that are NaN or infinite: {place}"):
        read_coco(tmp_path / "x.json")


def test_nan_is_pandas_word_for_a_value_that_is_not_there(tmp_path: Path) -> None:
    nan = float("nan")
    entries = {"annotations": [{"id": 1, "area": nan, "bbox": nan}], "info": {"year": nan}}
    (tmp_path / "x.json").write_text(json.dumps({**json.loads(LISTS), **entries}))
    findings = Findings("x.json")
    data = read_coco(tmp_path / "x.json", findings=findings)
    assert data["annotations"] == [{"id": 1, "area": None, "bbox": None}]
    assert data["info"] == {"year": None} and findings.count("mended") == 3


def test_a_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        read_coco(tmp_path / "nowhere.json")
