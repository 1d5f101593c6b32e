"""Coordinates against their picture: those far outside of it, and those that are fractions of it.

A size is the (height, width) of the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gn_det.data.coco.findings import Findings
from gn_det.data.coco.values import finite_numbers, parsed

__all__ = ["Fractions", "coordinates", "is_fraction", "lie_far_outside", "lie_outside"]

Size = tuple[int, int]


def coordinates(value: Any) -> list[float]:
    """The numbers of lists, however nested, or of a text that is such; [] for everything else."""
    value = parsed(value)
    return (finite_numbers([*_flat(value)]) or []) if isinstance(value, list) else []


def _flat(value: Any) -> Iterator[Any]:
    rest = [value]
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest.extend(reversed(value))
        else:
            yield value


def lie_outside(xs: Sequence[float], ys: Sequence[float], size: Size) -> bool:
    """Whether one is outside of the picture, by more than a pixel."""
    height, width = size
    return min(xs) < -1 or max(xs) > width + 1 or min(ys) < -1 or max(ys) > height + 1


def lie_far_outside(xs: Sequence[float], ys: Sequence[float], size: Size) -> bool:
    """Whether one is further from the picture than the picture is wide or high."""
    height, width = size
    return min(xs) < -width or max(xs) > 2 * width or min(ys) < -height or max(ys) > 2 * height


def is_fraction(numbers: Sequence[float], size: Size) -> bool:
    """Whether coordinates are not all 0, and none is above 1 in a picture that is larger."""
    return any(numbers) and max(numbers) <= 1 and min(size) > 10


def _begins_above_1(value: Any) -> bool:
    """Whether a look at the first number is enough, as it is for nearly all."""
    first = next(_flat(value), None)
    return isinstance(first, (int, float)) and first > 1


class Fractions:
    """Counts the annotations that are written in fractions of their picture."""

    def __init__(self) -> None:
        self._annotations = 0
        self._found: list[tuple[str, str, Any]] = []

    def look_at(self, written: Mapping[str, Any], size: Size, place: str) -> None:
        """Note an annotation of fractions, before it is dropped since it has hardly a pixel.

        Args:
            written: its coordinates by what they are of, in the plural.
            size: of its picture.
            place: where it is.
        """
        found = [
            (f"{kind} look like fractions", place, value)
            for kind, value in written.items()
            if not _begins_above_1(value) and is_fraction(coordinates(value), size)
        ]
        self._annotations += bool(found)
        self._found += found

    def report(self, findings: Findings, total: int) -> None:
        """Warn of what was noted, and refuse it where it is most of all annotations.

        Args:
            findings: told of it.
            total: how many annotations there are.
        """
        verdict = "refused" if 2 * self._annotations > total else "warned"
        advice = "multiply what lies in x by its width and what lies in y by its height"
        for what, place, value in self._found:
            findings.add(verdict, f"{what} of their picture: {advice}", place, value)
