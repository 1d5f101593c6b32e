"""Whether annotations were drawn on pictures as a person sees them, or as they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gn_det.data.coco.values import finite_numbers, parsed, whole_number

__all__ = ["drawn_as_stored"]

Sizes = Mapping[int, tuple[int, int]]  # (width, height) by the id of the picture


def drawn_as_stored(
    images: Iterable[dict[str, Any]], annotations: Sequence[Any], upright: Sizes
) -> Sizes:
    """The pictures that a tag turns by a quarter, and whose annotations are of the stored ones.

    The JSON of such a picture has the size that is stored. Its boxes tell whether they are, too:
    those that reach out of the stored picture are not. Where all boxes of the set fit both, the
    size in the JSON decides.

    Args:
        images: of the JSON, normalised.
        annotations: of the JSON, in any state.
        upright: sizes of the files as they are seen, where the JSON has others.

    Returns:
        Their stored sizes, all or none.
    """
    stored = {
        image["id"]: (image["width"], image["height"])
        for image in images
        if (image["height"], image["width"]) == upright.get(image["id"])
    }
    beyond_upright = beyond_stored = 0
    for annotation in annotations:
        if not isinstance(annotation, dict):
            continue
        image, box = whole_number(annotation.get("image_id")), parsed(annotation.get("bbox"))
        box = finite_numbers(box) if isinstance(box, list) and len(box) == 4 else None
        if image not in stored or box is None:
            continue
        right, bottom = box[0] + box[2], box[1] + box[3]
        beyond_upright += _beyond(right, bottom, upright[image])
        beyond_stored += _beyond(right, bottom, stored[image])
    return {} if beyond_stored > beyond_upright else stored


def _beyond(right: float, bottom: float, size: tuple[int, int]) -> bool:
    return right > size[0] + 1 or bottom > size[1] + 1
