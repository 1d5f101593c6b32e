"""The pictures of a JSON: ids, names and sizes as tools write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.coco import HEIGHT, WIDTH, dataset

from gn_det import InputError
from gn_det.data.bad_images import find_bad_images
from gn_det.data.coco import other_sizes

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


def test_sizes_that_are_not_the_files_are_told_from_other_faults(
    normalised: Normalised, images: Path
) -> None:
    Image.new("RGB", (100, 90)).save(images / "1.png")
    (images / "2.png").write_text("no picture")
    bad = find_bad_images(normalised()[0]["images"], images)
    assert other_sizes(bad, images) == {1: (100, 90)}


def test_the_size_of_the_file_is_used_and_warned_of(normalised: Normalised) -> None:
    data, findings = normalised(file_sizes={1: (100, 90)})
    assert (data["images"][0]["width"], data["images"][0]["height"]) == (100, 90)
    assert findings.count("warned") == 1 and findings.changed
    assert "100x90, not 80x60" in findings.table()


def test_rle_masks_do_not_fit_another_size(normalised: Normalised) -> None:
    rle = {"size": [HEIGHT, WIDTH], "counts": [100, 100, HEIGHT * WIDTH - 200]}
    with pytest.raises(InputError, match="2 RLE masks have another size than their picture"):
        normalised(each=lambda a: a.update(segmentation=rle), file_sizes={1: (100, 90)})


def test_a_file_in_place_of_the_folder_is_told(normalised: Normalised, images: Path) -> None:
    for image in images.iterdir():
        image.unlink()
    images.rmdir()
    images.touch()
    with pytest.raises(InputError, match="images is not a folder of images"):
        normalised()
