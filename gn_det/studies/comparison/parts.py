"""Parts of a training set: so many of its pictures, and a quarter to choose settings on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gn_det.data.coco import read_coco
from gn_det.errors import InputError
from gn_det.files import make_folder, write_atomically

__all__ = ["hold_out_a_quarter", "write_part"]

_SEED = 0
_LEAST_TO_SPLIT = 4


def write_part(json_file: str, pictures: int, output: Path) -> None:
    """Write a JSON of so many pictures of another in COCO format, drawn at random.

    Pictures without objects are left out. A smaller part is a part of a larger one, and every call
    draws the same.

    Raises:
        InputError: there are not so many, or the file cannot be read.
    """
    dataset = read_coco(json_file)
    images = _with_objects(dataset)
    if not 1 <= pictures <= len(images):
        raise InputError(
            f"a part of {pictures} pictures: {json_file} has {len(images)} with objects; name 1 to "
            f"{len(images)} of them, or all"
        )
    _write(dataset, images[:pictures], output)


def hold_out_a_quarter(json_file: str, train: Path, held_out: Path) -> None:
    """Divide a JSON in COCO format into one of three quarters of its pictures and one of the rest.

    Raises:
        InputError: there are fewer than 4 pictures with objects, or the file cannot be read.
    """
    dataset = read_coco(json_file)
    images = _with_objects(dataset)
    if len(images) < _LEAST_TO_SPLIT:
        raise InputError(
            f"{json_file} has {len(images)} pictures with objects, and to choose learning rates on "
            f"a quarter of them it takes {_LEAST_TO_SPLIT}; name one rate alone"
        )
    number = len(images) // 4
    _write(dataset, images[number:], train)
    _write(dataset, images[:number], held_out)


def _with_objects(dataset: dict[str, Any]) -> list[Any]:
    """Ids of the pictures, in an order that the seed draws."""
    there = {a.get("image_id") for a in dataset["annotations"] if not a.get("iscrowd")}
    ids = [image.get("id") for image in dataset["images"] if image.get("id") in there]
    random.Random(_SEED).shuffle(ids)
    return ids


def _write(dataset: dict[str, Any], ids: list[Any], file: Path) -> None:
    chosen = set(ids)
    part = {
        **dataset,
        "images": [image for image in dataset["images"] if image.get("id") in chosen],
        "annotations": [a for a in dataset["annotations"] if a.get("image_id") in chosen],
    }
    make_folder(file.parent)
    write_atomically(file, json.dumps(part))
