"""Keypoints of objects: [x, y, visibility] for each that a category lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gn_det.data.coco.coordinates import lie_far_outside, lie_outside
from gn_det.data.coco.findings import Findings, RefusedError, shown
from gn_det.data.coco.values import finite_numbers

__all__ = ["flip_pairs", "keypoint_names", "normalise_keypoints", "visible_points"]

_SIDES = ("left", "right"), ("l", "r")
# left_eye, leftEye, LEye, eye.left, lefteye
_PARTS = re.compile(
    r"left|right|[A-Z]+(?![a-z])|[A-Z]?[a-z]+?(?=left|right|[^a-z]|$)|\d+", re.ASCII
)


def keypoint_names(categories: Sequence[dict[str, Any]]) -> list[str]:
    """The keypoints that all categories list; [] where one lists none, or others."""
    lists = [category.get("keypoints") for category in categories]
    same = bool(lists) and all(isinstance(one, list) and one == lists[0] for one in lists)
    return [str(name) for name in lists[0]] if same else []


def flip_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """The keypoints that change places in a mirrored picture: left_eye and right_eye, l and r."""
    parts = {tuple(part.lower() for part in _PARTS.findall(name)): name for name in names}
    pairs = []
    for one, name in parts.items():
        for left, right in _SIDES:
            other = parts.get(tuple(right if part == left else part for part in one))
            if left in one and other is not None:
                pairs.append((name, other))
    return pairs


def visible_points(numbers: Sequence[float]) -> list[float]:
    """[x, y, x, y, ...] of the keypoints that are set."""
    points = zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=False)
    return [number for x, y, v in points if v > 0 for number in (x, y)]


def normalise_keypoints(
    annotation: dict[str, Any],
    needed: int | None,
    size: tuple[int, int],
    place: str,
    findings: Findings,
) -> None:
    """Bring the keypoints of an annotation into COCO's form, in place.

    Args:
        annotation: to be changed.
        needed: how many keypoints each category lists; None where the model learns none.
        size: (height, width) of the picture.
        place: where the annotation is.
        findings: told of what is mended, and of keypoints outside of the picture.

    Raises:
        RefusedError: they are needed, and not three finite numbers each, not as many as the
            category lists, of another visibility than 0, 1 and 2, or far outside of the picture.
    """
    written = annotation.get("keypoints")
    if not written and needed is None:
        annotation.pop("keypoints", None)
        return
    absent: list[float] | None = None
    if not written:
        written = absent = [0] * 3 * needed
        findings.add("mended", "objects without keypoints: none of them is visible", place)
    try:
        numbers = _checked(written, needed, size)
    except RefusedError as refused:
        if needed is not None:
            raise
        what, value = refused.args
        findings.add("mended", f"{what}, and nothing learns them: left out", place, text=value)
        del annotation["keypoints"]
        return
    points = visible_points(numbers)
    if needed is not None and points and lie_outside(points[0::2], points[1::2], size):
        findings.add("warned", "keypoints lie outside of their picture", place, points)
    if numbers is not written:
        findings.add("mended", "keypoints with numbers written as text", place, written)
    annotation["keypoints"] = numbers
    visible = sum(v > 0 for v in numbers[2::3])
    if annotation.get("num_keypoints") != visible:
        if needed is not None and annotation["keypoints"] is not absent:
            findings.add("mended", "num_keypoints is not the number of those that are set", place)
        annotation["num_keypoints"] = visible


def _checked(written: Any, needed: int | None, size: tuple[int, int]) -> list[float]:
    numbers = finite_numbers(written) if isinstance(written, list) else None
    if numbers is None or len(numbers) % 3:
        raise RefusedError("keypoints are not three finite numbers each", shown(written))
    if needed is not None and len(numbers) != 3 * needed:
        what = "annotations have not as many keypoints as their category lists"
        raise RefusedError(what, f"{len(numbers) // 3}, and {needed} are listed")
    if not {*numbers[2::3]} <= {0, 1, 2}:
        raise RefusedError("keypoints have another visibility than 0, 1 and 2", shown(written))
    points = visible_points(numbers)
    if points and lie_far_outside(points[0::2], points[1::2], size):
        outside = f"{shown(points)} in a picture of {size[1]}x{size[0]}"
        raise RefusedError("keypoints lie far outside of their picture", outside)
    return numbers
