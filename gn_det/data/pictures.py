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

from gn_det.data.tiff import TiffHeader, tiff_header
from gn_det.errors import InputError
from gn_det.text import printable, reason_of

__all__ = [
    "PictureError",
    "is_deep",
    "is_turned",
    "picture_size",
    "problem_of",
    "read_picture",
    "read_suffixes",
    "upright_size",
]

_ORIENTATION = 0x0112
_WIDTH, _HEIGHT = 256, 257  # of TIFF
# How an upright picture becomes the stored one again, for tags that turn it by a quarter.
_STORED = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
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
    b"%!PS": "a PostScript file",
}
# What Pillow opens but does not read itself: for PostScript, it would run Ghostscript.
_UNREAD = {
    "EPS": "a PostScript file",
    "WMF": "a Windows metafile",
    "MPEG": "a video",
    "HDF5": "an HDF5 file",
    "GRIB": "a GRIB file",
    "BUFR": "a BUFR file",
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
    with _file(path) as file, _decoding(path):
        if tiff := _deep_tiff(file):
            return tiff.size[::-1] if tiff.orientation in _STORED else tiff.size
        with _opened(path, file) as image:
            return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an open picture when its orientation tag has turned it."""
    size = image.size
    if image.format == "TIFF":  # newer Pillows turn it as they open
        size = image.tag_v2[_WIDTH], image.tag_v2[_HEIGHT]
    return size[::-1] if _orientation(image) in _STORED else size


def is_turned(path: str | Path) -> bool:
    """Whether a tag turns a picture by a quarter.

    Raises:
        PictureError: it is missing, or no picture.
    """
    with _file(path) as file, _decoding(path):
        if tiff := _deep_tiff(file):
            return tiff.orientation in _STORED
        with _opened(path, file) as image:
            return _orientation(image) in _STORED


def is_deep(path: str | Path) -> bool:
    """Whether a picture has values of more than 8 bits, from its header.

    Raises:
        PictureError: it is missing, or no picture.
    """
    with _file(path) as file, _decoding(path):
        if _deep_tiff(file):
            return True
        with _opened(path, file) as image:
            return image.mode in _DEEP or _has_deep_tiles(image)


def read_suffixes() -> set[str]:
    """What names of pictures that can be read end in, in lower case and with the dot."""
    formats = Image.registered_extensions()
    return {end for end, of in formats.items() if of in Image.OPEN and of not in _UNREAD}


def _deep_tiff(file: IO[bytes]) -> TiffHeader | None:
    tiff = tiff_header(file)
    return tiff if tiff and tiff.is_deep else None


def _orientation(image: Image.Image) -> int:
    """The tag that says how a picture is turned; 1 where there is none, or none can be read."""
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # the block may be behind the picture
    with suppress(Exception):  # of a block that is no EXIF: asked again, Pillow gives what there is
        image.getexif()
    exif = image.getexif()
    with suppress(Exception):
        if (tag := exif.get(_ORIENTATION)) in range(1, 9):
            return int(tag)
    return 1


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
        image = Image.open(file)
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path} is too large for Pillow to open") from error
    except Exception as error:
        if tiff := tiff_header(file):
            raise PictureError(
                f"{path} is damaged, or not an image that Pillow or OpenCV reads: it has {tiff}"
            ) from error
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
    if image.format in _UNREAD:
        raise PictureError(f"{path} is {_UNREAD[image.format]}; convert it to PNG or JPEG")
    return image


def _decoded(
    path: str | Path, content: bytes, value_range: Sequence[float]
) -> tuple[Image.Image, int]:
    """An upright RGB picture, and the tag of its orientation."""
    tiff = tiff_header(io.BytesIO(content))
    if tiff and not tiff.is_read:
        raise _not_read(path, tiff)
    if tiff and tiff.is_deep:
        values = _of_deep_tiff(path, content, tiff)
        return _scaled(path, values, value_range, tiff.white_is_zero), tiff.orientation
    image = _opened(path, io.BytesIO(content))
    deep = _has_deep_tiles(image)
    stored = _orientation(image)
    image.load()  # raises where data are damaged; a conversion would go on with what is there
    left = _orientation(image)  # Pillow turns a TIFF as it loads
    if image.mode in _DEEP:
        picture = _scaled(path, _values(image), value_range)
    elif deep:  # several channels, of which Pillow has kept 8 bits
        picture, left = _scaled(path, _by_opencv(path, content), value_range), stored
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
    return values


def _of_deep_tiff(path: str | Path, content: bytes, tiff: TiffHeader) -> np.ndarray:
    """(H, W) or (H, W, 3) in the file's own type, RGB, upright."""
    values = _decoded_by_opencv(content)  # which turns a TIFF; Pillow misreads most of these
    if values is None:  # damaged, or compressed as OpenCV does not know
        image = _opened(path, io.BytesIO(content))
        image.load()
        values = _values(ImageOps.exif_transpose(image))
        if not image.mode.startswith("I;16"):
            raise PictureError(
                f"{path} has {tiff}, compressed as OpenCV does not know; compress it by LZW"
            )
    kind = np.dtype(tiff.kind)
    channels = values.shape[2] if values.ndim == 3 else 1
    if (channels, values.dtype.itemsize) != (tiff.channels, kind.itemsize):
        raise _not_read(path, tiff)
    values = values.view(kind)
    if not tiff.has_alpha:
        return values if channels == 1 else values[:, :, 2::-1]
    return _on_white(values[:, :, 2::-1], values[:, :, 3:], tiff.is_premultiplied)


def _not_read(path: str | Path, tiff: TiffHeader) -> PictureError:
    return PictureError(
        f"{path} has {tiff}, a kind of TIFF that is not read; convert it to PNG or JPEG"
    )


def _by_opencv(path: str | Path, content: bytes) -> np.ndarray:
    """(H, W) or (H, W, 3) in the file's own type, RGB."""
    values = _decoded_by_opencv(content)
    if values is None:
        raise PictureError(f"{path} is not an image that Pillow or OpenCV reads")
    if values.ndim == 3 and values.shape[2] not in (3, 4):
        raise PictureError(f"{path} has {values.shape[2]} bands; a picture has 1, 3 or 4")
    if values.ndim == 2:
        return values
    colours = values[:, :, 2::-1]
    return _on_white(colours, values[:, :, 3:]) if values.shape[2] == 4 else colours


def _decoded_by_opencv(content: bytes) -> np.ndarray | None:
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # of sizes that are none
        return None
    finally:
        cv2.utils.logging.setLogLevel(level)


def _on_white(colours: np.ndarray, alpha: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    if colours.dtype.kind != "u":  # no type of pictures with transparent parts
        return colours
    most = np.iinfo(colours.dtype).max
    part = alpha / most
    seen = colours * (1 if premultiplied else part) + most * (1 - part)
    return np.round(seen.clip(0, most)).astype(colours.dtype)


def _scaled(
    path: str | Path,
    values: np.ndarray,
    value_range: Sequence[float],
    white_is_zero: bool = False,
) -> Image.Image:
    """Values of any type to RGB of 8 bits; their lowest is white where white_is_zero."""
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
    if white_is_zero:
        low, high = high, low
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
