"""Pictures are found under the names that other programs gave them, and only inside the folder."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from gn_det.data.coco.file_names import find_files, leaves_folder

BAER = "Bär 1.jpg"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for name in ("a.jpg", "b.jpg", f"sub/{BAER}", "sub/deep/c.jpg", "Upper.JPG", "50%25.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("written", "found", "forms"),
    [
        ("images\\a.jpg", "a.jpg", ["backslashes", "a leading folder too many"]),
        (f"sub\\{BAER}", f"sub/{BAER}", ["backslashes"]),
        ("images/a.jpg", "a.jpg", ["a leading folder too many"]),
        ("data/images/train/a.jpg", "a.jpg", ["a leading folder too many"]),
        ("/home/me/images/a.jpg", "a.jpg", ["a leading folder too many"]),
        ("C:\\Users\\me\\a.jpg", "a.jpg", ["backslashes", "a leading folder too many"]),
        ("/data/local-files/?d=images/a.jpg", "a.jpg", ["a leading folder too many"]),
        ("https://example.com/x/a.jpg", "a.jpg", ["a leading folder too many"]),
        ("./x/./sub/deep/c.jpg", "sub/deep/c.jpg", ["a leading folder too many"]),
        ("c.jpg", "sub/deep/c.jpg", ["a leading folder too few"]),
        ("deep/c.jpg", "sub/deep/c.jpg", ["a leading folder too few"]),
        ("sub/B%C3%A4r%201.jpg", f"sub/{BAER}", ["URL-quoted"]),
        ("50%.png", "50%25.png", ["not URL-quoted"]),
        ("A.JPG", "a.jpg", ["another case"]),
        ("upper.jpg", "Upper.JPG", ["another case"]),
        ("SUB/DEEP/c.jpg", "sub/deep/c.jpg", ["another case"]),
        (f"sub/{unicodedata.normalize('NFD', BAER)}", f"sub/{BAER}", ["another Unicode form"]),
        ("a.jpg\n", "a.jpg", ["spaces or line ends around them"]),
        (" a.jpg ", "a.jpg", ["spaces or line ends around them"]),
        ("/data/local-files/?d=a.jpg", "a.jpg", ["a URL's query"]),
        ("a.jpg?raw=1", "a.jpg", ["a URL's query"]),
        ("a", "a.jpg", ["another extension"]),
        ("sub/deep/c.jpeg", "sub/deep/c.jpg", ["another extension"]),
        ("upper.jpeg", "Upper.JPG", ["another extension"]),
        ("a.png", "a.jpg", None),  # which may be a mask of it
        ("x\\B%C3%A4R%201.JPG", f"sub/{BAER}", None),
    ],
)
def test_the_usual_forms_are_tried_alone_and_together(
    folder: Path, written: str, found: str, forms: list[str] | None
) -> None:
    if forms is None:  # a folder too many and one too few would be anything
        assert find_files([written], folder).files == {}
    else:
        assert find_files([written], folder).files == {written: (found, ", ".join(forms))}


def test_names_on_a_disk_in_nfd_are_found_too(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", BAER)
    (tmp_path / decomposed).touch()
    assert find_files([BAER], tmp_path).files == {BAER: (decomposed, "another Unicode form")}


@pytest.mark.parametrize(
    "names",
    [
        ["a.jpg", "sub/deep/c.jpg", "Upper.JPG"],  # are there
        ["./a.jpg", "sub/../b.jpg"],
        ["z.jpg", "images/z.jpg"],  # are not
        ["a.jpg", "train/a.jpg"],  # one file would be two pictures
        ["train/a.jpg", "val/a.jpg"],
        ["../images2/a.jpg", "..\\a.jpg"],
        ["a.jpg\0"],
        ["", ".", "/"],
    ],
)
def test_what_is_there_or_could_be_several_is_left_alone(folder: Path, names: list[str]) -> None:
    assert find_files(names, folder).files == {}


def test_a_name_that_could_be_two_files_is_not_found(folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "c.jpg").touch()
    both = {"c.jpg": ["other/c.jpg", "sub/deep/c.jpg"]}
    assert find_files(["c.jpg", "a.jpg", "z.jpg"], folder) == ({}, both)
    # One that lost its file is no other one's.
    assert find_files(["third/c.jpg", "other/c.jpg", "sub/deep/c.jpg"], folder) == ({}, {})
    (folder / "A.JPG").touch()
    assert find_files(["A.jpg"], folder) == ({}, {"A.jpg": ["A.JPG", "a.jpg"]})


def test_whole_paths_below_the_folder_are_taken_without_a_search(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.walk", None)
    name = str(folder / "sub/deep/c.jpg")
    assert find_files([name], folder).files[name][0] == "sub/deep/c.jpg"
    assert find_files([name], "/").files[name][0] == name[1:]


def test_links_that_lead_round_are_no_trouble(folder: Path) -> None:
    (folder / "sub" / "again").symlink_to(folder)
    assert find_files(["images/a.jpg"], folder).files["images/a.jpg"][0] == "a.jpg"


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("a.jpg", False),
        ("sub/../a.jpg", False),
        ("../images/a.jpg", False),
        ("../a.jpg", True),
        ("sub/../../a.jpg", True),
        ("../images2/a.jpg", True),
        ("/etc/hostname", True),
    ],
)
def test_a_name_stays_inside_of_its_folder(folder: Path, name: str, leaves: bool) -> None:
    assert leaves_folder(name, folder) == leaves
