"""What is wrong with COCO-format data is found before training and told in one line."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gn_det import InputError
from gn_det.data.coco import check_annotations, find_bad_images, image_problem, read_coco


def dataset() -> dict:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": 10, "width": 20}],
        "categories": [{"id": 7, "name": "thing"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 1,
                "category_id": 7,
                "bbox": [1, 1, 5, 5],
                "area": 25,
                "iscrowd": 0,
                "segmentation": [[1, 1, 6, 1, 6, 6]],
            }
        ],
    }


def check(data: dict, **options: bool) -> None:
    check_annotations(data, "x.json", **{"masks": True, "evaluated": True, **options})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no list 'images'"),
        ('{"images": [], "annotations": {}, "categories": []}', "no list 'annotations'"),
        ('{"images": [3]}', r"images\[0\] has 3 for 'id'"),
        ('{"images": [{"id": 1}]}', r"images\[0\] has 'nothing' for 'file_name'"),
        (
            '{"images": [{"id": 1, "file_name": "a", "height": "9", "width": 9}]}',
            r"images\[0\] has '9' for 'height'",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a", "height": 9, "width": 9},'
            ' {"id": 1, "file_name": "b", "height": 9, "width": 9}]}',
            "ids of images occur twice: 1",
        ),
    ],
)
def test_malformed_json_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        read_coco(tmp_path / "x.json")
    assert "x.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        read_coco(tmp_path / "nowhere.json")


def test_sound_annotations_pass(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(dataset()))
    check(read_coco(tmp_path / "x.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(image_id=2), "1 belong to an image that is not there: 1"),
        (lambda a: a.update(category_id=8), "1 have a category_id that is not declared: 1"),
        (lambda a: a.update(bbox=[1, 1, 0, 5]), "1 have a box without area: 1"),
        (lambda a: a.update(bbox=[1, 1, -3, 5]), "without area"),
        (lambda a: a.update(bbox=[1, 1, 5]), "without area"),
        (lambda a: a.update(bbox=[1, 1, float("nan"), 5]), "without area"),
        (lambda a: a.pop("segmentation"), "no segmentation .* MODEL.MASK_ON False"),
        (lambda a: a.update(segmentation=[]), "no segmentation"),
        (lambda a: a.update(segmentation=[[]]), "neither polygons nor an RLE"),
        (lambda a: a.update(segmentation=[[1, 1, 2, 2]]), "neither polygons nor an RLE"),
        (lambda a: a.update(segmentation=[[1, 1, 2, 2, 3, 3, 4]]), "neither polygons nor an RLE"),
        (lambda a: a.update(segmentation="mask"), "neither polygons nor an RLE"),
        (lambda a: a.update(segmentation={"counts": [1]}), "neither polygons nor an RLE"),
        (
            lambda a: a.update(segmentation={"counts": [200], "size": [20, 10]}),
            "1 have a segmentation that is neither polygons nor an RLE of the image's size",
        ),
        (lambda a: a.pop("area"), "lack area or iscrowd"),
        (lambda a: a.update(id=0), r"1 have the id 0, .*\(number them from 1\)"),
    ],
)
def test_an_annotation_that_nothing_can_be_learnt_from_is_refused(
    change: Callable[[dict], object], message: str
) -> None:
    data = dataset()
    change(data["annotations"][0])
    with pytest.raises(InputError, match=message):
        check(data)


def test_every_kind_of_problem_is_told_at_once_with_counts() -> None:
    data = dataset()
    good = data["annotations"][0]
    data["annotations"] = [{**good, "id": i, "bbox": [0, 0, 0, 0]} for i in range(9)]
    data["annotations"][3]["category_id"] = 99
    with pytest.raises(InputError, match=r"1 have a category_id .* 3; 9 have a box .* and 4 more"):
        check(data)


def test_the_evaluation_indeed_takes_the_id_0_for_no_match() -> None:
    def ap(first_id: int) -> float:
        truth, data = COCO(), dataset()
        data["annotations"][0]["id"] = first_id
        with contextlib.redirect_stdout(io.StringIO()):
            truth.dataset = data
            truth.createIndex()
            found = {"image_id": 1, "category_id": 7, "bbox": [1, 1, 5, 5], "score": 0.9}
            evaluation = COCOeval(truth, truth.loadRes([found]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats[0]

    assert ap(1) == pytest.approx(1) and ap(0) == 0


def test_masks_and_areas_are_asked_for_only_where_they_are_read() -> None:
    data = dataset()
    del data["annotations"][0]["segmentation"], data["annotations"][0]["area"]
    check(data, masks=False, evaluated=False)


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    def write(suffix: str = ".jpg", size: tuple[int, int] = (20, 10), **options: object) -> Path:
        noise = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
        path = tmp_path / f"picture{suffix}"
        Image.fromarray(noise).save(path, **options)
        return path

    return write


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tiff"])
def test_a_sound_picture_passes(picture: Callable[..., Path], suffix: str) -> None:
    assert image_problem(picture(suffix), 10, 20) is None


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("kept", [0.98, 0.5])
def test_a_truncated_picture_is_found(
    picture: Callable[..., Path], suffix: str, kept: float
) -> None:
    path = picture(suffix, size=(200, 100))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert image_problem(path, 100, 200) == "truncated"


def test_bytes_after_the_end_marker_are_no_fault(picture: Callable[..., Path]) -> None:
    path = picture()
    path.write_bytes(path.read_bytes() + b"\0" * 100)
    assert image_problem(path, 10, 20) is None


def test_missing_empty_and_foreign_files_are_found(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not a picture at all")
    assert image_problem(tmp_path / "nowhere.jpg", 1, 1) == "missing"
    assert image_problem(tmp_path / "empty.jpg", 1, 1) == "empty"
    assert image_problem(tmp_path / "text.jpg", 1, 1) == "not an image"


def test_a_file_in_place_of_the_folder_is_told(picture: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match=r"picture\.jpg is not a folder of images"):
        find_bad_images([], picture())


def test_a_picture_that_is_too_large_to_open_is_told(
    picture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    assert image_problem(picture(), 10, 20) == "too large for Pillow to open"


def test_a_size_other_than_the_jsons_is_found(picture: Callable[..., Path]) -> None:
    assert image_problem(picture(), 20, 10) == "20x10 where the JSON says 10x20"


def test_a_picture_that_exif_turns_has_the_size_of_the_upright_one(
    picture: Callable[..., Path],
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = picture(size=(20, 10), exif=exif)
    assert image_problem(path, 20, 10) is None
    assert image_problem(path, 10, 20) is not None


def test_all_bad_images_are_listed_in_order(picture: Callable[..., Path]) -> None:
    path = picture()
    images = [
        {"id": i, "file_name": name, "height": 10, "width": 20}
        for i, name in enumerate(["lost.jpg", path.name, "gone.jpg"])
    ]
    bad = find_bad_images(images, path.parent)
    assert [(image["id"], problem) for image, problem in bad] == [(0, "missing"), (2, "missing")]
