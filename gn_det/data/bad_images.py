"""Which pictures of a data set training would fail on, found before it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from gn_det.data.pictures import PictureError, is_deep, problem_of, read_picture, upright_size
from gn_det.files import check_folder

__all__ = ["dark_images", "find_bad_images", "image_problem"]

_JPEG_END = b"\xff\xd9"
_DARK = 16  # of 255: what 12 bits in 16 become
_TAIL_BYTES = 4096  # cameras and tools append a few bytes; phones a whole video


def find_bad_images(
    images: Sequence[dict[str, Any]], image_root: str | Path, value_range: Sequence[float] = ()
) -> list[tuple[dict[str, Any], str]]:
    """Find images that training would fail on.

    Args:
        images: the JSON's images.
        image_root: the folder that their file_name is relative to.
        value_range: see :func:`gn_det.data.pictures.read_picture`.

    Returns:
        (image, what is wrong) for each that is missing, no image, damaged, or of another size than
        the JSON says.

    Raises:
        InputError: image_root is no folder, or cannot be looked at.
    """
    check_folder(image_root, "images")

    def problem(image: dict[str, Any]) -> str | None:
        path = Path(image_root) / image["file_name"]
        return image_problem(path, image["height"], image["width"], value_range)

    with ThreadPoolExecutor(max_workers=16) as pool:  # Pillow decodes without Python's lock
        problems = tqdm(
            pool.map(problem, images),
            total=len(images),
            desc="checking images",
            unit="image",
            delay=2,
        )
        return [(image, p) for image, p in zip(images, problems, strict=True) if p]


def dark_images(
    images: Sequence[dict[str, Any]], image_root: str | Path, most: int = 32
) -> list[dict[str, Any]]:
    """Images of more than 8 bits that use under a sixteenth of their type's range, as 12 bits do.

    Args:
        images: sound ones.
        image_root: the folder that their file_name is relative to.
        most: how many to look at, from the first on.

    Returns:
        Those with more than 8 bits where all of them are dark; none where one of them is not.
    """
    paths = {image["id"]: Path(image_root) / image["file_name"] for image in images[:most]}
    try:
        deep = [image for image in images[:most] if is_deep(paths[image["id"]])]
        dark = all(read_picture(paths[image["id"]], "L").max() <= _DARK for image in deep)
    except PictureError:  # of a kind without a range, or not read
        return []
    return deep if dark else []


def image_problem(
    path: Path, height: int, width: int, value_range: Sequence[float] = ()
) -> str | None:
    """What is wrong with an image file, or None.

    A JPEG, of which large data sets consist, is not decoded: its header and its end are looked for.
    The others are read as in training.

    Args:
        path: of the file.
        height, width: in pixels, as the JSON says, of the picture as a person sees it.
        value_range: see :func:`gn_det.data.pictures.read_picture`.
    """
    try:
        found = _jpeg_size(path) or read_picture(path, "RGB", value_range).shape[1::-1]
    except PictureError as error:
        return problem_of(path, error)
    if found != (width, height):
        return f"{found[0]}x{found[1]} where the JSON says {width}x{height}"
    return None


def _jpeg_size(path: Path) -> tuple[int, int] | None:
    """(width, height) of a whole JPEG, upright; None for another file."""
    try:
        with Image.open(path) as image:
            if image.format not in ("JPEG", "MPO"):
                return None
            size = upright_size(image)
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            whole = _JPEG_END in file.read()
            if not whole:
                file.seek(0)
                whole = _has_end(file.read())
    except Exception:
        return None  # the reader says what it is
    if not whole:
        raise PictureError(f"{path} is truncated")
    return size


def _has_end(content: bytes) -> bool:
    """Whether a JPEG has its end marker, apart from that of a thumbnail in a segment before it."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place + 1] != 0xDA:  # start of scan
        place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return content.find(_JPEG_END, place) >= 0
