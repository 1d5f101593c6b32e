"""What annotations were drawn on, where the size in the JSON is not that of the file.

A frame is a width and height that objects can be of. Those that reach out of it are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gn_det.data.coco.coordinates import coordinates
from gn_det.data.coco.values import finite_numbers, parsed, whole_number

__all__ = ["drawn_as_stored", "drawn_at_another_scale"]

Size = tuple[int, int]  # width, height
Sizes = Mapping[int, Size]  # by the id of the picture
_SHARE = 0.1  # of the objects that are expected there; fewer are there by mistake


def drawn_as_stored(stored: Sizes, upright: Sizes, annotations: Sequence[Any]) -> bool | None:
    """Whether annotations are of pictures as they are stored, or as a tag turns them by a quarter.

    Args:
        stored: sizes of such pictures as they are stored, which the JSON has.
        upright: as a person sees them.
        annotations: of the JSON, in any state.

    Returns:
        What most of those say that fit one of both alone; None where all fit both.
    """
    of_stored = of_upright = 0
    for image, object_ in _objects(annotations, stored):
        fits_stored, fits_upright = (object_.fits(sizes[image]) for sizes in (stored, upright))
        of_stored += fits_stored and not fits_upright
        of_upright += fits_upright and not fits_stored
    return None if of_stored == of_upright else of_stored > of_upright


def drawn_at_another_scale(written: Sizes, files: Sizes, annotations: Sequence[Any]) -> set[int]:
    """The pictures that were resized after their objects were drawn, with the size in the JSON.

    Both sizes have the same proportions. Some objects of the larger one reach out of the smaller
    one. Where hardly one does, the smaller one is theirs.

    Args:
        written: sizes in the JSON that are not those of the files.
        files: sizes of the files.
        annotations: of the JSON, in any state.
    """
    alike = {n for n, size in written.items() if _is_scaled(size, files[n])}
    larger = {n for n in alike if written[n] > files[n]}
    found: set[int] = set()
    for pictures, small, large in (
        (larger, files, written),
        (alike - larger, written, files),
    ):
        objects = [*_objects(annotations, pictures)]
        only_large = sum(o.fits(large[n]) and not o.fits(small[n]) for n, o in objects)
        # As many as would reach beyond the small one if they lay anywhere in the large one.
        expected = sum(1 - (small[n][0] / large[n][0]) ** 2 for n, _ in objects)
        are_of_large = only_large > _SHARE * expected
        if objects and are_of_large == (large is written):
            found |= pictures
    return found


def _is_scaled(one: Size, other: Size) -> bool:
    """Whether sizes have the same proportions, but for rounding, and are not nearly the same."""
    factors = one[0] / other[0], one[1] / other[1]
    rounding = 1 / min(*one, *other)
    same = abs(factors[0] - factors[1]) <= rounding * max(factors)
    return same and not 0.98 < factors[0] < 1.02


class _Object:
    """How far an annotation reaches, and of what picture its RLE is."""

    def __init__(self, annotation: Mapping[str, Any]) -> None:
        mask, box = (parsed(annotation.get(key)) for key in ("segmentation", "bbox"))
        self._reach: Size | None = None
        self._of: list[int | None] = []
        points = coordinates(mask)
        box = finite_numbers(box) if isinstance(box, list) and len(box) == 4 else None
        if isinstance(mask, dict) and isinstance(mask.get("size"), list):
            self._of = [whole_number(number) for number in mask["size"]]
        elif points:
            self._reach = max(points[0::2]), max(points[1::2], default=0)
        elif box and box[2] > 0 and box[3] > 0:
            self._reach = box[0] + box[2], box[1] + box[3]

    def __bool__(self) -> bool:
        return self._reach is not None or bool(self._of)

    def fits(self, size: Size) -> bool:
        if self._reach is None:
            return self._of == [size[1], size[0]]
        return self._reach[0] <= size[0] + 1 and self._reach[1] <= size[1] + 1


def _objects(annotations: Sequence[Any], images: Iterable[int]) -> Iterator[tuple[int, _Object]]:
    """Yields (id of the picture, object) of some pictures."""
    images = {*images}
    for annotation in annotations if images else ():
        image = whole_number(annotation.get("image_id"))
        if image in images and (found := _Object(annotation)):
            yield image, found
