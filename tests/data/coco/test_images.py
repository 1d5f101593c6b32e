"""The pictures of a JSON: ids, names and sizes as tools write them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.coco import HEIGHT, WIDTH, dataset

from gn_det import InputError

Normalised = Callable[..., tuple[dict, Any]]


@pytest.mark.parametrize("name", ["1.png", "./1.png"])
def test_a_file_under_two_ids_is_one_picture_with_all_objects(
    normalised: Normalised, name: str
) -> None:
    def two_ids(data: dict) -> None:
        data["images"].append({**data["images"][0], "id": 7, "file_name": name})
        data["annotations"][1].update(image_id=7, bbox=[10, 10, 30, 31])  # was of 1

    data, findings = normalised(two_ids)
    assert [image["id"] for image in data["images"]] == [1, 2]
    assert sorted(a["image_id"] for a in data["annotations"]) == [1, 1, 2, 2]
    assert "files have two image ids" in findings.table()


@pytest.mark.parametrize("kind", [str, float, lambda i: f" {i} ", lambda i: f"{i}.0"])
def test_ids_in_text_or_with_a_point_are_numbers(
    normalised: Normalised, kind: Callable[[int], object]
) -> None:
    def change(data: dict) -> None:
        for image in data["images"]:
            image["id"] = kind(image["id"])
        for annotation in data["annotations"]:
            annotation["image_id"] = kind(annotation["image_id"])

    data, findings = normalised(change)
    assert data == dataset() and findings.count("mended") == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "1.jpg"}, "1 image ids are no whole numbers .*'1.jpg'"),
        ({"id": None}, "1 image ids are no whole numbers"),
        ({"id": 1.5}, "1 image ids are no whole numbers"),
        ({"id": True}, "1 image ids are no whole numbers"),
        ({"id": 2**63}, "1 image ids are no whole numbers"),
        ({"id": 2}, "1 image ids have two files .image 2: '1.png', '2.png'"),
        ({"id": "2"}, "1 image ids have two files"),
        ({"file_name": None}, "1 images have no file_name .image 1: None"),
        ({"file_name": 7}, "1 images have no file_name"),
        ({"file_name": " "}, "1 images have no file_name"),
        ({"file_name": "../1.png"}, "1 file names leave the folder .*images .image 1: '../1.png'"),
        ({"file_name": "../../1.png\x1b[2J"}, r"leave the folder .*'../../1.png\\x1b\[2J'"),
        ({"file_name": "/etc/hostname"}, "1 file names leave the folder"),
        ({"file_name": "1.png\0"}, "1 file names are none that a file can have"),
        ({"file_name": "\ud800.png"}, "1 file names are none that a file can have"),
    ],
)
def test_pictures_without_a_number_or_a_place_of_their_own_are_refused(
    normalised: Normalised, change: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        normalised(lambda d: d["images"][0].update(change))


def test_a_picture_that_is_listed_twice_is_one(normalised: Normalised) -> None:
    data, findings = normalised(lambda d: d["images"].append(dict(d["images"][0])))
    assert data == dataset() and "images are listed twice" in findings.table()


@pytest.mark.parametrize(
    "size",
    [
        {"width": None, "height": None},
        {"width": -1, "height": -1},
        {"width": 0, "height": 0},
        {"width": 10**12, "height": HEIGHT},
        {"width": "", "height": "unknown"},
        {"width": float(WIDTH), "height": float(HEIGHT)},
        {"width": str(WIDTH), "height": f"{HEIGHT}.0"},
        {"width": WIDTH, "height": None},
        {},
    ],
)
def test_sizes_are_those_of_the_files_where_the_json_has_none(
    normalised: Normalised, size: dict
) -> None:
    def change(data: dict) -> None:
        for image in data["images"]:
            del image["width"], image["height"]
            image.update(size)

    data, findings = normalised(change)
    assert data == dataset() and findings.count("mended") == 2


def test_a_picture_that_cannot_be_read_has_no_size_then(
    normalised: Normalised, images: Path
) -> None:
    (images / "1.png").write_text("no picture")
    data, _ = normalised(lambda d: d["images"][0].update(width=None))
    assert data["images"][0]["width"] is None
    assert len(data["annotations"]) == 4


def test_lvis_names_its_pictures_by_their_address(normalised: Normalised) -> None:
    def change(data: dict) -> None:
        for image in data["images"]:
            name = image.pop("file_name")
            image["coco_url"] = f"http://images.cocodataset.org/train2017/{name}"

    data, findings = normalised(change)
    assert [image["file_name"] for image in data["images"]] == ["1.png", "2.png"]
    assert "that of their coco_url" in findings.table()


def test_a_name_that_could_be_two_files_is_refused_with_both(
    normalised: Normalised, images: Path
) -> None:
    for split in ("train", "val"):
        (images / split).mkdir()
        shutil.copy(images / "1.png", images / split / "0.png")
    with pytest.raises(InputError, match=r"could be several files.*'0.png', 'train/0.png, val/0"):
        normalised(lambda d: d["images"][0].update(file_name="0.png"))


def test_a_file_in_place_of_the_folder_is_told(normalised: Normalised, images: Path) -> None:
    for image in images.iterdir():
        image.unlink()
    images.rmdir()
    images.touch()
    with pytest.raises(InputError, match="images is not a folder of images"):
        normalised()
