"""Masks of objects: polygons and run-length encodings (RLE), as COCO-format files have them."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from operator import mul
from typing import Any

import numpy as np
import pycocotools.mask as mask_util

from gn_det.data.coco.coordinates import lie_far_outside
from gn_det.data.coco.findings import DroppedError, RefusedError, shown
from gn_det.data.coco.values import finite_numbers, parsed, whole_number

__all__ = ["SCRAPS", "Mask", "normalise_segmentation"]

SCRAPS = "polygons that are scraps beside a good one"
_ADVICE = "write polygons as [[x1, y1, x2, y2, ...]]"

Size = tuple[int, int]


@dataclass
class Mask:
    """What an object's segmentation holds.

    Attributes:
        segmentation: polygons, or an RLE of the picture's size.
        extent: (x0, y0, x1, y1) of what it covers in pixels, inside of the picture.
        size: (height, width) of the picture.
        mended: what had to be changed, each in the plural.
        scraps: polygons that were left out.
        known_area: of one polygon that is plain; 0 where the mask has to be drawn for it.
    """

    segmentation: list[list[float]] | dict[str, Any]
    extent: tuple[float, float, float, float]
    size: Size
    mended: list[str]
    scraps: list[list[Any]] = field(default_factory=list)
    known_area: float = 0

    @property
    def area(self) -> float:
        """Pixels that it covers."""
        if self.known_area:
            return self.known_area
        rle = self.segmentation
        if isinstance(rle, list):
            rle = mask_util.merge(mask_util.frPyObjects(rle, *self.size))
        elif isinstance(rle["counts"], list):
            rle = mask_util.frPyObjects(rle, *self.size)
        return float(mask_util.area(rle))


def normalise_segmentation(value: Any, size: Size) -> Mask | None:
    """Bring a segmentation into COCO's form.

    Args:
        value: polygons, points, an RLE, or the JSON of these as a text.
        size: (height, width) of the picture.

    Returns:
        The mask; None where there is nothing.

    Raises:
        RefusedError: it has no meaning.
        DroppedError: it covers no pixel.
    """
    mended = []
    if isinstance(value, str):
        if not value.strip():
            return None
        if value != (value := parsed(value)):
            mended.append("segmentations written as text")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
        mended.append("RLE masks in a list")
    if isinstance(value, str):
        return _counts_alone(value, size, mended)
    if value in (None, [], {}) or (isinstance(value, list) and all(v in ([], None) for v in value)):
        return None
    if isinstance(value, dict):
        if not {"counts", "size"} & value.keys():
            what = "segmentations are objects without the counts of an RLE"
            raise RefusedError(f"{what}: {_ADVICE}", shown(value))
        return _rle(value, size, mended)
    if isinstance(value, list):
        return _polygons(value, size, mended)
    raise RefusedError("segmentations are neither polygons nor RLE", shown(value))


def _counts_alone(text: str, size: Size, mended: list[str]) -> Mask:
    try:
        return _rle({"counts": text}, size, mended)
    except RefusedError as error:
        what = "segmentations are text with no run lengths that sum to height × width"
        raise RefusedError(f"{what}: {_ADVICE}", shown(text)) from error


def _polygons(value: list[Any], size: Size, mended: list[str]) -> Mask:
    height, width = size
    kept: list[list[float]] = []
    scraps: list[tuple[str, Any]] = []
    for given in _lists_of_numbers(value, mended):
        numbers = finite_numbers(given)
        if numbers is None:
            if list in map(type, given):
                raise RefusedError(f"polygons are lists in too many lists: {_ADVICE}", shown(value))
            raise RefusedError("polygons have something that is no finite number", shown(given))
        if numbers is not given:
            mended.append("polygons with numbers written as text")
        if len(numbers) % 2:
            what = "polygons have an odd number of coordinates"
            raise RefusedError(what, f"{len(numbers)} of them, {shown(given)}")
        points = _without_repetition(numbers)
        if len(points) < len(numbers):
            mended.append("polygons with closing or repeated points")
        if len(points) < 6:
            scraps.append(("polygons have fewer than three points", given))
            continue
        xs, ys = points[0::2], points[1::2]
        if lie_far_outside(xs, ys, size):
            outside = f"{shown(given)} in a picture of {width}x{height}"
            raise RefusedError("polygons lie far outside of their picture", outside)
        area = _plain_area(xs, ys, size)
        if area or mask_util.area(mask_util.frPyObjects([points], *size)[0]):
            kept.append(points)
        elif _has_area(points):
            scraps.append(("masks are without a pixel of their picture", given))
        else:
            scraps.append(("polygons have no area", given))
    if not kept:
        raise DroppedError(scraps[0][0], shown(scraps[0][1]))
    xs, ys = ([v for points in kept for v in points[axis::2]] for axis in (0, 1))
    extent = max(min(xs), 0), max(min(ys), 0), min(max(xs), width), min(max(ys), height)
    return Mask(
        kept, extent, size, mended, [polygon for _, polygon in scraps], area * (len(kept) == 1)
    )


def _lists_of_numbers(value: list[Any], mended: list[str]) -> list[list[Any]]:
    """Polygons as [x, y, x, y, ...] each, whatever lists they are written in."""
    if any(isinstance(item, dict) for item in value):
        what = "segmentations are lists of objects: merge them into one RLE, or"
        raise RefusedError(f"{what} {_ADVICE}", shown(value))
    if not any(isinstance(item, list) for item in value):
        mended.append("polygons that are no list of polygons")
        return [value]
    polygons = [item for item in value if item not in ([], None)]
    if not all(isinstance(item, list) for item in polygons):
        raise RefusedError("segmentations mix lists and numbers", shown(value))
    if all(_is_point(item) for item in polygons):
        mended.append("polygons of pairs of coordinates")
        return [[number for point in polygons for number in point]]
    if all(all(_is_point(point) for point in item) for item in polygons):
        mended.append("polygons of pairs of coordinates")
        return [[number for point in item for number in point] for item in polygons]
    return polygons


def _is_point(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and not isinstance(item[0], list)


def _without_repetition(numbers: list[float]) -> list[float]:
    """The points of a polygon without those that equal the one before."""
    points = list(zip(numbers[0::2], numbers[1::2], strict=True))
    before = points[-1:] + points[:-1]
    if not any(map(tuple.__eq__, points, before)):
        return numbers
    kept = [p for p, other in zip(points, before, strict=True) if p != other]
    return [number for point in kept for number in point]


def _plain_area(xs: list[float], ys: list[float], size: Size) -> float:
    """The area of a polygon that has a pixel for certain, which drawing it takes longer to tell.

    0 for one that has to be drawn: it is thin, crosses itself or reaches out of the picture.
    """
    if min(xs) < 0 or min(ys) < 0 or max(ys) > size[0] or max(xs) > size[1]:
        return 0
    doubled = sum(map(mul, xs, ys[1:] + ys[:1])) - sum(map(mul, xs[1:] + xs[:1], ys))
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    is_plain = abs(doubled) > max(4 * max(width, height), 0.5 * width * height)
    return abs(doubled) / 2 if is_plain else 0


def _has_area(points: list[float]) -> bool:
    """Whether not all points of a polygon are on one line."""
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    x, y = x - x[0], y - y[0]
    far = np.argmax(x**2 + y**2)
    return bool((np.abs(x[far] * y - y[far] * x) > 1e-9 * (x[far] ** 2 + y[far] ** 2)).any())


def _rle(value: dict[str, Any], size: Size, mended: list[str]) -> Mask:
    counts = value.get("counts")
    given = value.get("size")
    if given is None:
        mended.append("RLE masks without a size")
        given = list(size)
    own = [whole_number(number) for number in given] if isinstance(given, list) else []
    if own != list(size):
        raise RefusedError(
            "RLE masks have another size than their picture",
            f"{shown(given)}, not [height {size[0]}, width {size[1]}]",
        )
    if own != given or {type(number) for number in given} != {int}:
        mended.append("RLE masks with sizes written as text or 160.0")
    if isinstance(counts, str):
        text = counts.strip()
        if text.startswith(("b'", 'b"')) and text[-1:] == text[1]:  # str() of Python's bytes
            text = _of_bytes(text)
        if text[:1] == "[":
            counts = parsed(text)
        elif " " in text or "," in text:
            counts = text.replace(",", " ").split()
        elif text != counts:
            counts = text
            mended.append("RLE masks with counts in another text than COCO's")
    if isinstance(counts, str):
        runs = _decompressed(counts)
    elif isinstance(counts, list):
        numbers = (
            counts if {type(c) for c in counts} <= {int} else [whole_number(c) for c in counts]
        )
        runs = None if None in numbers else np.array(numbers, dtype=object)
        if numbers is not value.get("counts"):
            mended.append("RLE masks with counts written as text or 160.0")
        counts = numbers
    else:
        runs = None
    if runs is None or (runs < 0).any():
        raise RefusedError(
            "RLE masks have counts that are no run lengths", shown(value.get("counts"))
        )
    total = int(runs.sum())
    if total != size[0] * size[1]:
        raise RefusedError(
            "RLE masks have counts that do not sum to height × width",
            f"{total}, not {size[0]} × {size[1]} = {size[0] * size[1]}",
        )
    if not runs[1::2].any():
        raise DroppedError("masks are without a pixel of their picture", shown(value.get("counts")))
    segmentation = {"size": list(size), "counts": counts}
    compressed = isinstance(counts, str)
    rle = segmentation if compressed else mask_util.frPyObjects(segmentation, *size)
    x, y, w, h = map(float, mask_util.toBbox(rle))
    return Mask(segmentation, (x, y, x + w, y + h), size, mended)


def _of_bytes(text: str) -> str:
    try:
        return ast.literal_eval(text).decode("ascii")
    except (ValueError, SyntaxError):
        return text


def _decompressed(counts: str) -> np.ndarray | None:
    """Run lengths of COCO's compressed RLE, or None where it is none.

    Each character holds 5 bits, from the lowest on, and whether another follows; the last one's
    highest bit is the sign. From the fourth run on, it is the difference to the last but one that
    is written.
    """
    try:
        codes = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63:
        return None
    last = (codes & 32) == 0
    ends = np.flatnonzero(last)
    if not last[-1]:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 7:  # beyond what any picture needs
        return None
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    values = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends] & 16) != 0
    values = np.where(negative, values - (1 << (5 * (ends - starts + 1))), values)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values
