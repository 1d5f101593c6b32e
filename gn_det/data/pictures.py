"""The one reader of pictures: what a person sees, or an error that names the file."""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import cv2
import numpy as np
from detectron2.data.detection_utils import convert_PIL_to_numpy
from PIL import Image, ImageCms, ImageOps

from gn_det.errors import InputError
from gn_det.text import printable, reason_of

__all__ = [
    "PictureError",
    "is_deep",
    "is_turned",
    "picture_size",
    "problem_of",
    "read_picture",
    "upright_size",
]

_ORIENTATION = 0x0112
# How an upright picture becomes the stored one again, for tags that turn it by a quarter.
_STORED = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_WIDTH, _HEIGHT, _PHOTOMETRIC, _WHITE_IS_ZERO = 256, 257, 262, 0  # of TIFF
_DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")  # modes of one channel of more than 8 bits
_PAGE = "an HTML page, as a failed download leaves"
# What people have as pictures and Pillow does not read, by what the file begins with.
_FOREIGN = {
    b"%PDF": "a PDF",
    b"<svg": "an SVG",
    b"<?xml": "an SVG or XML file",
    b"<!DOC": _PAGE,
    b"<html": _PAGE,
    b"\x80\x02": "a pickle",
    b"PK\x03\x04": "an archive",
    b"\x89HDF": "an HDF5 file",
    b"SIMPLE": "a FITS file",
}
_AVIF = "an AVIF picture that is damaged, or of a kind that Pillow does not read"
_BRANDS = {"hei": "an HEIC picture", "hev": "an HEIC picture", "mif": "an HEIC picture"}
_BRANDS |= {"avif": _AVIF, "avis": _AVIF}


class PictureError(InputError):
    """A picture that cannot be read, or is not one."""


def problem_of(path: str | Path, error: Exception) -> str:
    """What an error says of a picture, in one line and without its path."""
    text = printable(error).removeprefix(printable(f"{path} ")).removeprefix("is ")
    return " ".join(text.split())


def read_picture(
    path: str | Path,
    format: str = "BGR",
    value_range: Sequence[float] = (),
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Read a picture as a person sees it.

    It is turned by its EXIF or TIFF orientation, once. Transparent parts are white. Of an animation
    or a file of several pages, the first one counts. Values of more than 8 bits are scaled by
    value_range, or else by the range of their type: 0 to 65535 of 16 bits, 0 to 1 of floats;
    32-bit integers have none. Never by what one picture holds.

    Args:
        path: of the file.
        format: "BGR", "RGB", "L" or "YUV-BT.601", as Detectron2 has them.
        value_range: (low, high) that become 0 and 255, for values of more than 8 bits; values
            outside are cut off.
        size: (width, height) that the picture should have: one that has it only as it is stored is
            not turned.

    Returns:
        (H, W, C) uint8 with values from 0 to 255; floats for YUV-BT.601.

    Raises:
        PictureError: the file is missing or cannot be read, is damaged, or holds no picture of 1,
            3 or 4 channels; with the reason.
    """
    with _file(path) as file:
        content = file.read()
    with _decoding(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image, orientation = _decoded(path, content, value_range)
    if size is not None and image.size != size == image.size[::-1] and orientation in _STORED:
        image = image.transpose(_STORED[orientation])
    return convert_PIL_to_numpy(image, format)


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as :func:`read_picture` reads it, from its header.

    Raises:
        PictureError: it is missing, or no picture.
    """
    with _file(path) as file, _decoding(path), _opened(path, file) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an open picture when its orientation tag has turned it."""
    size = image.size
    if image.format == "TIFF":  # newer Pillows turn it as they open
        size = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
    return size[::-1] if _turns(image) else size


def is_turned(path: str | Path) -> bool:
    """Whether a tag turns a picture by a quarter.

    Raises:
        PictureError: it is missing, or no picture.
    """
    with _file(path) as file, _decoding(path), _opened(path, file) as image:
        return _turns(image)


def _turns(image: Image.Image) -> bool:
    return image.getexif().get(_ORIENTATION, 1) in _STORED


def is_deep(path: str | Path) -> bool:
    """Whether a picture has values of more than 8 bits, from its header.

    Raises:
        PictureError: it is missing, or no picture that Pillow knows.
    """
    with _file(path) as file, _decoding(path), _opened(path, file) as image:
        return image.mode in _DEEP or _has_deep_tiles(image)


@contextmanager
def _file(path: str | Path) -> Iterator[IO[bytes]]:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise PictureError(f"{path} is not a file")
        if not status.st_size:
            raise PictureError(f"{path} is empty")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise PictureError(f"{path} is missing") from error
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {reason_of(error)}") from error


@contextmanager
def _decoding(path: str | Path) -> Iterator[None]:
    """What Pillow's decoders raise of damaged files has many classes, RuntimeError among them."""
    try:
        yield
    except PictureError:
        raise
    except Exception as error:
        raise PictureError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _opened(path: str | Path, file: IO[bytes]) -> Image.Image:
    try:
        return Image.open(file)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} is too large for Pillow to open") from error
    except Exception as error:
        file.seek(0)
        head = file.read(64)
        start = head.lstrip()
        kind = next((what for begin, what in _FOREIGN.items() if start.startswith(begin)), "")
        if head[4:8] == b"ftyp":
            brand = head[8:12].decode("ascii", "replace").strip()
            kind = next((what for of, what in _BRANDS.items() if brand.startswith(of)), "")
            kind = kind or f"a video ({brand})"
        raise PictureError(
            f"{path} is {kind}; convert it to PNG or JPEG" if kind else f"{path} is not an image"
        ) from error


def _decoded(
    path: str | Path, content: bytes, value_range: Sequence[float]
) -> tuple[Image.Image, int]:
    """An upright RGB picture, and the tag of its orientation."""
    try:
        image = _opened(path, io.BytesIO(content))
    except PictureError:
        if not content.startswith((b"II", b"MM")):  # Pillow does not know all TIFFs
            raise
        return _scaled(path, _by_opencv(path, content), value_range), 1
    deep = _has_deep_tiles(image)
    stored = image.getexif().get(_ORIENTATION, 1)
    image.load()  # raises where data are damaged; a conversion would go on with what is there
    left = image.getexif().get(_ORIENTATION, 1)  # Pillow turns a TIFF as it loads
    if image.mode in _DEEP:
        picture = _scaled(path, _values(image), value_range)
    elif deep:  # several channels, of which Pillow has kept 8 bits
        picture = _scaled(path, _by_opencv(path, content), value_range)
        left = 1 if image.format == "TIFF" else stored  # OpenCV turns a TIFF, too
    else:
        picture = _as_rgb(image)
    exif = Image.Exif()
    exif[_ORIENTATION] = left
    picture.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(picture), stored


def _has_deep_tiles(image: Image.Image) -> bool:
    return any(";16" in str(tile[3]) for tile in image.tile)


def _values(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    values = values.astype(values.dtype.newbyteorder("="))
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # of 16 bits
        values = values.astype(np.uint16)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = np.iinfo(values.dtype).max - values
    return values


def _by_opencv(path: str | Path, content: bytes) -> np.ndarray:
    """(H, W) or (H, W, 3) in the file's own type, RGB."""
    values = None
    with suppress(cv2.error):  # of sizes that are none
        values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None:
        raise PictureError(f"{path} is not an image that Pillow or OpenCV reads")
    if values.ndim == 3 and values.shape[2] not in (3, 4):
        raise PictureError(f"{path} has {values.shape[2]} bands; a picture has 1, 3 or 4")
    if values.ndim == 2:
        return values
    colours = values[:, :, 2::-1]
    return _on_white(colours, values[:, :, 3:]) if values.shape[2] == 4 else colours


def _on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    if colours.dtype.kind != "u":  # no type of pictures with transparent parts
        return colours
    most = np.iinfo(colours.dtype).max
    part = alpha / most
    return np.round(colours * part + most * (1 - part)).astype(colours.dtype)


def _scaled(path: str | Path, values: np.ndarray, value_range: Sequence[float]) -> Image.Image:
    """Values of any type to RGB of 8 bits."""
    advice = "say which with INPUT.VALUE_RANGE (value_range of a LazyConfig's mapper)"
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise PictureError(f"{path} has values that are not finite")
    if value_range:
        low, high = value_range
    elif values.dtype == np.uint8:
        low, high = 0, 255
    elif values.dtype == np.uint16:
        low, high = 0, 65535
    elif values.dtype.kind == "f":
        low, high = 0, 1
        if values.min() < 0 or values.max() > 1:
            raise PictureError(
                f"{path} has values from {values.min():g} to {values.max():g}, and floats without "
                f"a range of their own are from 0 to 1; {advice}"
            )
    else:
        raise PictureError(
            f"{path} has integers from {values.min()} to {values.max()}, whose type has no range "
            f"for pictures; {advice}"
        )
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return Image.fromarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8)).convert("RGB")


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "LAB":
        return ImageCms.profileToProfile(
            image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return Image.alpha_composite(white, layer).convert("RGB")
    return image.convert("RGB")
