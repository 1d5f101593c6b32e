"""Keypoints of objects: [x, y, visibility] for each that a category lists."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gn_det.data.coco.findings import Findings, RefusedError, shown
from gn_det.data.coco.values import finite_numbers

__all__ = ["flip_pairs", "keypoint_names", "normalise_keypoints"]

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


def normalise_keypoints(
    annotation: dict[str, Any], needed: int | None, place: str, findings: Findings
) -> None:
    """Bring the keypoints of an annotation into COCO's form, in place.

    Args:
        annotation: to be changed.
        needed: how many keypoints each category lists; None where the model learns none.
        place: where the annotation is.
        findings: told of what is mended.

    Raises:
        RefusedError: they are needed, and not three finite numbers each, or not as many as the
            category lists.
    """
    written = annotation.get("keypoints")
    if not written and needed is None:
        annotation.pop("keypoints", None)
        return
    absent: list[float] | None = None
    if not written:
        written = absent = [0] * 3 * needed
        findings.add("mended", "objects without keypoints: none of them is visible", place)
    numbers = finite_numbers(written) if isinstance(written, list) else None
    if needed is None and (numbers is None or len(numbers) % 3):
        what = "keypoints that are not three numbers each, and that nothing learns: left out"
        findings.add("mended", what, place, written)
        del annotation["keypoints"]
        return
    if numbers is None or len(numbers) % 3:
        raise RefusedError("keypoints are not three finite numbers each", shown(written))
    if needed is not None and len(numbers) != 3 * needed:
        what = "annotations have not as many keypoints as their category lists"
        raise RefusedError(what, f"{len(numbers) // 3}, and {needed} are listed")
    if numbers is not written:
        findings.add("mended", "keypoints with numbers written as text", place, written)
    annotation["keypoints"] = numbers
    visible = sum(v > 0 for v in numbers[2::3])
    if annotation.get("num_keypoints") != visible:
        if needed is not None and annotation["keypoints"] is not absent:
            findings.add("mended", "num_keypoints is not the number of those that are set", place)
        annotation["num_keypoints"] = visible
