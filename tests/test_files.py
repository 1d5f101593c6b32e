"""Files that programs of gn_det write for themselves and others."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gn_det import InputError
from gn_det.files import check_folder, read_json, whole_file, write_json


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", dict, "cannot be read"), (b"{", dict, "cannot be read"), (b"\xff{}", dict, "be read"),
        (b"[]", dict, "holds a list in place of a dict"), (b"null", dict, "holds a NoneType"),
        (b'{"a": 1}', list, "holds a dict in place of a list"), (b"[" * 99999, list, "be read"),
    ],
    ids=range(7),
)  # fmt: skip
def test_damaged_json_is_named_with_what_to_do(
    content: bytes, kind: type, message: str, tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"results\.json {message}.*; remove it|{message}"):
        read_json(tmp_path / "results.json", kind)


def test_json_has_null_where_it_has_no_number(tmp_path: Path) -> None:
    write_json(tmp_path / "r.json", {"ap": math.nan, 2: [math.inf, (-math.inf, 1.5)], "é": None})
    text = (tmp_path / "r.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    read = read_json(tmp_path / "r.json", dict)
    assert read == {"ap": None, "2": [None, [None, 1.5]], "é": None}


def test_a_link_stays_one_and_its_file_gets_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there/file")
    for content in (b"a", b"b"):
        with whole_file(tmp_path / "link") as file:
            file.write(content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "there/file").read_bytes() == content
    assert [*(tmp_path / "there").iterdir()] == [tmp_path / "there/file"]


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced_by_one(make: Callable, tmp_path: Path) -> None:
    make(tmp_path / "there")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    for name in ("there", "link"):
        with (
            pytest.raises(InputError, match=f"{name} cannot be written: it is no file, but a"),
            whole_file(tmp_path / name),
        ):
            pass
    assert not (tmp_path / "there").is_file() and (tmp_path / "link").is_symlink()


def test_a_folder_that_may_not_be_looked_at_is_told_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder(tmp_path, "images")
    (tmp_path / "file").touch()
    for name in ("nowhere", "file", "file/below"):
        with pytest.raises(InputError, match=f"{name} is not a folder of images"):
            check_folder(tmp_path / name, "images")

    def forbidden(path: object) -> None:  # as to another user than root
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", forbidden)
        with pytest.raises(InputError, match="x cannot be read: Permission denied"):
            check_folder("x", "images")
