"""Pictures as files: their size, and which of them training would fail on."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from gn_det.errors import InputError

__all__ = ["find_bad_images", "image_problem", "picture_size"]

_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096  # some cameras and tools append a few bytes after the end marker
_EXIF_ORIENTATION = 0x0112


def find_bad_images(
    images: Sequence[dict[str, Any]], image_root: str | Path
) -> list[tuple[dict[str, Any], str]]:
    """Find images that training would fail on, without decoding them.

    Args:
        images: the JSON's images.
        image_root: the folder that their file_name is relative to.

    Returns:
        (image, what is wrong) for each that is missing, no image, of another size than the JSON
        says, or truncated.

    Raises:
        InputError: image_root is no folder.
    """

    if not Path(image_root).is_dir():
        raise InputError(f"{image_root} is not a folder of images")

    def problem(image: dict[str, Any]) -> str | None:
        path = Path(image_root) / image["file_name"]
        return image_problem(path, image["height"], image["width"])

    with ThreadPoolExecutor(max_workers=16) as pool:  # waits for the disk, not for the processor
        problems = tqdm(
            pool.map(problem, images),
            total=len(images),
            desc="checking images",
            unit="image",
            delay=2,
        )
        return [(image, p) for image, p in zip(images, problems, strict=True) if p]


def image_problem(path: Path, height: int, width: int) -> str | None:
    """What is wrong with an image file, or None; reads its header and its end."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            return "not a file"
        with Image.open(path) as image:
            kind, size = image.format, image.size
            # Detectron2 turns images upright; PNG would be decoded to look for its EXIF.
            if kind in ("JPEG", "MPO") and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
                size = size[::-1]
        with open(path, "rb") as file:
            length = file.seek(0, 2)
            file.seek(max(0, length - _TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return "missing"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:  # PIL's own OSErrors have none
            return error.strerror
        if isinstance(error, Image.DecompressionBombError):
            return "too large for Pillow to open"
        return "not an image" if path.stat().st_size else "empty"
    if _END_MARKERS.get(kind, b"") not in tail:
        return "truncated"
    if size != (width, height):
        return f"{size[0]}x{size[1]} where the JSON says {width}x{height}"
    return None


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as a person sees it, turned by its orientation tag.

    Raises:
        OSError: it is missing, or no picture.
    """
    with Image.open(path) as image:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) >= 5
        return image.size[::-1] if turned else image.size
