"""Boxes of objects, [x, y, width, height], and what makes them look like something else."""

from __future__ import annotations

from typing import Any

from gn_det.data.coco.coordinates import is_fraction, lie_far_outside, lie_outside
from gn_det.data.coco.findings import DroppedError, Findings, RefusedError, shown
from gn_det.data.coco.values import finite_numbers, parsed

__all__ = ["BoxSuspicions", "normalise_box"]

Corners = tuple[float, float, float, float]
_CORNERS = "boxes look like corners (x1, y1, x2, y2), not (x, y, width, height)"
_REACH_OUT = "boxes reach out of their picture"
_NOT_OF_MASK = "boxes are not those of their masks"


def normalise_box(
    value: Any, extent: Corners | None, size: tuple[int, int]
) -> tuple[list[float], str]:
    """Bring a box into COCO's form.

    Args:
        value: what is written.
        extent: (x0, y0, x1, y1) of the object's mask; None without one.
        size: (height, width) of the picture.

    Returns:
        [x, y, width, height], and what was mended, in the plural, or "".

    Raises:
        RefusedError: it is not four finite numbers, or reaches far out of its picture.
        DroppedError: it has no width or height, or lies outside of its picture.
    """
    what = ""
    if isinstance(value, str) and value != (value := parsed(value)):
        what = "boxes written as text"
    if value in (None, "", [], [0, 0, 0, 0], [None] * 4):
        if extent is None:
            raise DroppedError("boxes are missing, and no mask is there", shown(value))
        return _box_of(extent), "boxes are missing beside a mask: those of the masks"
    box = finite_numbers(value) if isinstance(value, list) and len(value) == 4 else None
    if box is None:
        raise RefusedError("boxes are not four finite numbers", shown(value))
    x, y, w, h = box
    lies_in = _lies_in(box, size)
    if w <= 0 or h <= 0 or not lies_in or lie_far_outside((x, x + w), (y, y + h), size):
        if extent is not None:
            return _box_of(extent), "boxes are impossible beside a mask: those of the masks"
        if w <= 0 or h <= 0:
            raise DroppedError("boxes have no width or height", shown(value))
        outside = f"{shown(box)} in a picture of {size[1]}x{size[0]}"
        if lies_in:
            raise RefusedError("boxes reach far out of their picture", outside)
        raise DroppedError("boxes lie outside of their picture", outside)
    return box, what or ("boxes with numbers written as text" if box is not value else "")


class BoxSuspicions:
    """Boxes that can be trained on, and are probably not what their author meant."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str, list[float]]] = []
        self._maybe_corners: list[tuple[str, list[float]]] = []
        self._all_fit_as_corners = True

    def look_at(
        self, box: list[float], extent: Corners | None, size: tuple[int, int], place: str
    ) -> None:
        """Note what is odd about a box.

        Args:
            box: as :func:`normalise_box` returned it.
            extent: (x0, y0, x1, y1) of its mask; None without one.
            size: (height, width) of its picture.
            place: where it is.
        """
        (x, y, w, h), (height, width) = box, size
        fits_as_corners = 0 <= x < w <= width + 1 and 0 <= y < h <= height + 1
        reaches_out = lie_outside((x, x + w), (y, y + h), size)
        of_mask = extent is None or _close((x, y, x + w, y + h), extent, size)
        if extent is None:
            self._all_fit_as_corners &= fits_as_corners
        if is_fraction(box, size):
            return
        if not of_mask and fits_as_corners and _close((x, y, w, h), extent, size):
            self._found.append((_CORNERS, place, box))
        elif reaches_out and extent is None:
            self._maybe_corners.append((place, box))
        elif reaches_out:
            self._found.append((_REACH_OUT, place, box))
        elif not of_mask:
            self._found.append((_NOT_OF_MASK, place, box))

    def report(self, findings: Findings) -> None:
        """Warn of what was noted."""
        # Without masks, every box has to be possible as corners before one looks like such.
        what = _CORNERS if self._all_fit_as_corners else _REACH_OUT
        for place, box in self._maybe_corners:
            findings.add("warned", what, place, box)
        for what, place, box in self._found:
            findings.add("warned", what, place, box)


def _lies_in(box: list[float], size: tuple[int, int]) -> bool:
    """Whether some of a box is in a picture of (height, width)."""
    x, y, w, h = box
    return x < size[1] and y < size[0] and x + w > 0 and y + h > 0


def _box_of(extent: Corners) -> list[float]:
    x0, y0, x1, y1 = extent
    return [x0, y0, x1 - x0, y1 - y0]


def _close(corners: Corners, extent: Corners, size: tuple[int, int]) -> bool:
    """Whether two boxes are one but for rounding and a loose hand, inside of the picture."""
    height, width = size
    x0, y0, x1, y1 = corners
    inside = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    tolerance = max(3, 0.1 * max(extent[2] - extent[0], extent[3] - extent[1]))
    return all(abs(a - b) <= tolerance for a, b in zip(inside, extent, strict=True))
