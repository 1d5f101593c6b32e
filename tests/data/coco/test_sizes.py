"""Sizes in the JSON that are not those of the files, up to what training reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image
from support.coco import HEIGHT, SQUARE, WIDTH, dataset

from gn_det.data.datasets import CheckedFolder, CocoFolder, read_folder

RLE = mask_util.frPyObjects([SQUARE], HEIGHT, WIDTH)[0]
RLE = {"size": RLE["size"], "counts": RLE["counts"].decode()}


@pytest.fixture
def read(images: Path, tmp_path: Path) -> Callable[..., CheckedFolder]:
    """Read the data set after a change of its JSON."""

    def run(change: Callable[[dict], object] = lambda d: None, **options: object) -> CheckedFolder:
        change(data := dataset())
        (tmp_path / "x.json").write_text(json.dumps(data))
        folder = CocoFolder("", str(tmp_path / "x.json"), str(images))
        return read_folder(folder, **{"masks": True, **options})

    return run


def resize(images: Path, factor: float) -> None:
    for file in images.iterdir():
        Image.new("RGB", (round(WIDTH * factor), round(HEIGHT * factor))).save(file)


@pytest.mark.parametrize("factor", [0.5, 2, 3.2])
def test_objects_of_resized_pictures_are_scaled(
    read: Callable[..., CheckedFolder], images: Path, factor: float
) -> None:
    def change(data: dict) -> None:
        data["annotations"][0]["segmentation"] = dict(RLE)
        data["annotations"][1]["segmentation"] = mask_util_counts()
        # One that reaches to the end, by which larger sizes are told from smaller ones.
        for annotation in data["annotations"][2:]:
            annotation.update(
                bbox=[50, 20, 30, 30], segmentation=[[50, 20, 80, 20, 80, 50, 50, 50]]
            )

    resize(images, factor)
    checked = read(change)
    size = [round(HEIGHT * factor), round(WIDTH * factor)]
    assert [checked.dataset["images"][0][key] for key in ("height", "width")] == size
    assert not checked.bad_images and checked.needs_copy
    first, second, third, _ = checked.dataset["annotations"]
    assert first["bbox"] == pytest.approx([10 * factor, 10 * factor, 30 * factor, 30 * factor])
    assert third["segmentation"][0][:2] == pytest.approx([50 * factor, 20 * factor])
    assert first["area"] == pytest.approx(900 * factor**2)
    for annotation in (first, second):
        assert annotation["segmentation"]["size"] == size
        x, y, w, h = mask_util.toBbox(annotation["segmentation"])
        assert [x, y, w, h] == pytest.approx(first["bbox"], abs=1)
    assert "2  images were resized after" in checked.findings.table()


def mask_util_counts() -> dict:
    """The square as an RLE that is not compressed."""
    mask = mask_util.decode(RLE)
    runs = np.flatnonzero(np.diff(mask.ravel(order="F"))) + 1
    counts = np.diff([0, *runs, HEIGHT * WIDTH]).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def test_objects_that_have_no_pixel_in_a_smaller_file_are_dropped(
    read: Callable[..., CheckedFolder], images: Path
) -> None:
    def change(data: dict) -> None:
        small = [70, 50, 71, 50, 71, 51, 70, 51]
        data["annotations"][0].update(bbox=[70, 50, 1, 1], segmentation=[small])

    resize(images, 0.25)
    checked = read(change)
    assert len(checked.dataset["annotations"]) == 3
    assert "without a pixel" in checked.findings.sentence("dropped")
    boxes = read(change, masks=False)
    assert len(boxes.dataset["annotations"]) == 4
    assert boxes.dataset["annotations"][0]["bbox"] == [17.5, 12.5, 0.25, 0.25]


@pytest.mark.parametrize(
    "size", [(HEIGHT, WIDTH), (1, 1), (20, 20), (WIDTH + 9, HEIGHT), (WIDTH // 4, HEIGHT // 4)]
)
@pytest.mark.parametrize("mask", [[list(SQUARE)], RLE], ids=["polygons", "RLE"])
def test_a_wrong_size_in_the_json_is_mended_before_masks_are_judged_by_it(
    read: Callable[..., CheckedFolder], size: tuple[int, int], mask: object
) -> None:
    def change(data: dict) -> None:
        for image in data["images"]:
            image["width"], image["height"] = size
        for annotation in data["annotations"]:
            annotation["segmentation"] = mask

    checked = read(change)
    assert [i["width"] for i in checked.dataset["images"]] == [WIDTH] * 2
    assert len(checked.dataset["annotations"]) == 4 and not checked.bad_images
    assert checked.dataset["annotations"][0]["bbox"] == [10, 10, 30, 30]
    assert "that of the file is used" in checked.findings.sentence("warned")


@pytest.mark.parametrize(
    ("segmentation", "stored"),
    [
        ([[10, 10, 40, 10, 40, 75, 10, 75]], False),
        ([[10, 10, 75, 10, 75, 40, 10, 40]], True),
        ([list(SQUARE)], True),  # fits both
    ],
)
@pytest.mark.parametrize("box", [None, [0, 0, 0, 0]])
def test_masks_tell_whether_a_tag_turns_the_picture_that_they_are_of(
    read: Callable[..., CheckedFolder], images: Path, segmentation: list, stored: bool, box: object
) -> None:
    def change(data: dict) -> None:
        for annotation in data["annotations"]:
            annotation.update(bbox=box, segmentation=segmentation)

    turn(images)
    checked = read(change)
    assert (checked.dataset["images"][0]["width"] == WIDTH) == stored
    assert len(checked.dataset["annotations"]) == 4
    assert checked.as_stored is (None if segmentation == [SQUARE] else stored)


def test_a_split_whose_objects_tell_nothing_follows_the_other_one(
    read: Callable[..., CheckedFolder], images: Path
) -> None:
    turn(images)
    assert read().dataset["images"][0]["width"] == WIDTH
    assert read(as_stored=True).dataset["images"][0]["width"] == WIDTH
    assert read(as_stored=False).dataset["images"][0]["width"] == HEIGHT


def turn(images: Path) -> None:
    """Let a tag turn the pictures by a quarter."""
    for file in [*images.iterdir()]:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (WIDTH, HEIGHT)).save(file, exif=exif)
