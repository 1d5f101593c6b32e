"""What a data set in COCO format is like, in a few numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gn_det.errors import InputError

__all__ = ["DataFacts", "facts_of"]


@dataclass(frozen=True)
class DataFacts:
    """What of a data set bears on how a detector learns from it.

    Attributes:
        pictures: that have objects.
        classes: categories.
        objects_per_picture: mean over those pictures, without crowds.
        object_size: median of the root of an object's box area over that of its picture.
    """

    pictures: int
    classes: int
    objects_per_picture: float
    object_size: float


def facts_of(dataset: Mapping[str, Any]) -> DataFacts:
    """The facts of a data set, normalised as :func:`gn_det.data.datasets.read_folder` does.

    Raises:
        InputError: no picture has an object with a box and a size.
    """
    areas = {}
    for image in dataset["images"]:
        if _is_positive(image.get("width")) and _is_positive(image.get("height")):
            areas[str(image.get("id"))] = image["width"] * image["height"]
    sizes, seen = [], set()
    for annotation in dataset["annotations"]:
        box, image = annotation.get("bbox"), str(annotation.get("image_id"))
        if annotation.get("iscrowd") or image not in areas or not _is_box(box):
            continue
        sizes.append(math.sqrt(box[2] * box[3] / areas[image]))
        seen.add(image)
    if not sizes:
        raise InputError("the data set has no picture with an object that has a box")
    return DataFacts(
        pictures=len(seen),
        classes=len(dataset["categories"]),
        objects_per_picture=len(sizes) / len(seen),
        object_size=statistics.median(sizes),
    )


def _is_box(box: Any) -> bool:
    return isinstance(box, list) and len(box) == 4 and _is_positive(box[2]) and _is_positive(box[3])


def _is_positive(number: Any) -> bool:
    return isinstance(number, (int, float)) and number > 0
