"""Images that training would fail on are found before it, and told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from gn_det import InputError
from gn_det.data.bad_images import dark_images, find_bad_images, image_problem
from gn_det.data.pictures import picture_size


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
    assert "truncated" in image_problem(path, 100, 200)


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


@pytest.mark.parametrize(
    "name", ["plain.png", "two  spaces.png", "zero\u200bwidth.png", "is is.png", "line\nbreak.png"]
)
def test_a_problem_is_told_without_the_name_of_the_file(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert image_problem(tmp_path / name, 1, 1) == "empty"


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
    assert picture_size(path) == (10, 20)


def test_all_bad_images_are_listed_in_order(picture: Callable[..., Path]) -> None:
    path = picture()
    images = [
        {"id": i, "file_name": name, "height": 10, "width": 20}
        for i, name in enumerate(["lost.jpg", path.name, "gone.jpg"])
    ]
    bad = find_bad_images(images, path.parent)
    assert [(image["id"], problem) for image, problem in bad] == [(0, "missing"), (2, "missing")]


@pytest.mark.parametrize(
    ("kind", "most", "dark"),
    [
        (np.uint16, 4095, True),
        (np.uint16, 255, True),
        (np.uint16, 20000, False),
        (np.uint8, 10, False),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_twelve_bits_in_sixteen_are_noticed(
    tmp_path: Path, kind: type, most: int, dark: bool, channels: int
) -> None:
    values = np.linspace(0, most, 200 * channels).reshape(10, 20, channels).astype(kind)
    cv2.imwrite(str(tmp_path / "a.png"), values)
    images = [{"id": 1, "file_name": "a.png"}]
    assert dark_images(images, tmp_path) == (images if dark else [])


def test_one_bright_image_tells_that_the_range_is_used(tmp_path: Path) -> None:
    for name, value in (("a.png", 900), ("b.png", 50_000)):
        cv2.imwrite(str(tmp_path / name), np.full((5, 6), value, np.uint16))
    images = [{"id": number, "file_name": f"{name}.png"} for number, name in enumerate("ab")]
    assert dark_images(images, tmp_path) == []
