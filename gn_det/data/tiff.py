"""What the tags of a TIFF say of its values: Pillow and OpenCV each read some of them wrongly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

__all__ = ["TiffHeader", "tiff_header"]

_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _CHANNELS = 256, 257, 258, 262, 274, 277
_PLANES, _EXTRA_CHANNELS, _FORMAT = 284, 338, 339
_WHITE_IS_ZERO, _PLANE_BY_PLANE = 0, 2
_FORMATS = {1: "uint", 2: "int", 3: "float"}
_COLOURS = {0: "gray", 1: "gray", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr", 8: "LAB"}
_SHALLOW = ("uint1", "uint2", "uint4", "uint8")
_DEEP = ("uint16", "int16", "uint32", "int32", "float32", "float64")
_PREMULTIPLIED, _STRAIGHT = 1, 2
# Colours, channels and extra ones of 8 bits that Pillow reads right in separate planes.
_IN_PLANES = {("RGB", 3, ()), ("RGB", 4, (_STRAIGHT,)), ("CMYK", 4, ()), ("YCbCr", 3, ())}


@dataclass(frozen=True)
class TiffHeader:
    """Of the first page.

    Attributes:
        size: (width, height) as stored.
        orientation: from 1 to 8, as of EXIF.
        kind: of the values, such as "uint16"; "mixed" where channels differ.
        channels: their number, alpha among them.
        colours: what they are, such as "gray" and "RGB".
        white_is_zero: whether gray is stored as a negative.
        in_planes: whether one channel is stored behind another.
        extra: what each channel behind the colours is, as of TIFF.
    """

    size: tuple[int, int]
    orientation: int
    kind: str
    channels: int
    colours: str
    white_is_zero: bool
    in_planes: bool
    extra: tuple[int, ...]

    @property
    def is_deep(self) -> bool:
        """Whether values have a sign or more than 8 bits."""
        return self.kind not in _SHALLOW

    @property
    def is_read(self) -> bool:
        """Whether Pillow or OpenCV reads such values right, if it reads them."""
        if self.is_deep:
            colours = self.colours in ("gray", "RGB") and self.channels in (1, 3, 4)
            return self.kind in _DEEP and colours and not self.in_planes
        return not self.in_planes or (self.colours, self.channels, self.extra) in _IN_PLANES

    @property
    def has_alpha(self) -> bool:
        return self.channels == 4 and self.extra[-1:] in ((), (_PREMULTIPLIED,), (_STRAIGHT,))

    @property
    def is_premultiplied(self) -> bool:
        return self.extra[-1:] == (_PREMULTIPLIED,)

    def __str__(self) -> str:
        planes = " in separate planes" if self.in_planes else ""
        plural = "s" if self.channels > 1 else ""
        return f"{self.channels} channel{plural} of {self.kind}{planes} ({self.colours})"


def tiff_header(file: IO[bytes]) -> TiffHeader | None:
    """Read what comes before the picture; None for another file, or one whose tags are damaged."""
    file.seek(0)
    head = file.read(8)
    try:
        if not head.startswith(tuple(PREFIXES)):
            return None
        tags = ImageFileDirectory_v2(head + file.read(8) if head[2] == 43 else head)  # BigTIFF
        file.seek(tags.next)
        tags.load(file)
        return _header(tags)
    except Exception:  # of many classes
        return None
    finally:
        file.seek(0)


def _header(tags: Mapping[int, Any]) -> TiffHeader:
    channels = tags.get(_CHANNELS, 1)
    photometric = tags.get(_PHOTOMETRIC)
    orientation = tags.get(_ORIENTATION, 1)
    return TiffHeader(
        size=(tags[_WIDTH], tags[_HEIGHT]),
        orientation=orientation if orientation in range(1, 9) else 1,
        kind=_kind({*tags.get(_BITS, (1,))[:channels]}, {*tags.get(_FORMAT, (1,))[:channels]}),
        channels=channels,
        colours=_COLOURS.get(photometric, f"PhotometricInterpretation {photometric}"),
        white_is_zero=photometric == _WHITE_IS_ZERO,
        in_planes=channels > 1 and tags.get(_PLANES, 1) == _PLANE_BY_PLANE,
        extra=tuple(tags.get(_EXTRA_CHANNELS, ())),
    )


def _kind(bits: set[int], formats: set[int]) -> str:
    if len(bits) > 1 or len(formats) > 1:
        return "mixed"
    (width,), (format,) = bits, formats
    return f"{_FORMATS.get(format, f'SampleFormat {format} of bits ')}{width}"
