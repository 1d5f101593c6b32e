"""Data sets by name: checked before a run, COCO-format folders registered with Detectron2."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from gn_det.data.coco import check_annotations, find_bad_images, read_coco
from gn_det.errors import InputError
from gn_det.utils import nearest, write_atomically

__all__ = ["CocoFolder", "check_folder", "check_registered", "register_folders", "without_images"]


@dataclass(frozen=True)
class CocoFolder:
    """A COCO-format data set: the name to register, the JSON, the folder of the images."""

    name: str
    json_file: str
    image_root: str


def check_folder(
    folder: CocoFolder, *, masks: bool, training: bool
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]:
    """Check annotations and images of a folder.

    Args:
        folder: what to check.
        masks: whether the model learns masks.
        training: a training split must have objects, a held-out one what the evaluation reads.

    Returns:
        The parsed JSON, and (image, what is wrong) for each unusable image.

    Raises:
        InputError: see :func:`gn_det.data.coco.read_coco` and ``check_annotations``; or a split
            without images, or a training split without objects.
    """
    dataset = read_coco(folder.json_file)
    check_annotations(dataset, folder.json_file, masks=masks, evaluated=not training)
    if not dataset["images"]:
        raise InputError(f"{folder.json_file} has no images")
    if training and all(a.get("iscrowd") for a in dataset["annotations"]):
        raise InputError(f"{folder.json_file} has no annotated object to train on")
    return dataset, find_bad_images(dataset["images"], folder.image_root)


def check_registered(name: str) -> tuple[dict[str, Any], list[tuple[dict[str, Any], str]]]:
    """Check the images of a data set that Detectron2 or the user's project registered.

    Returns:
        As :func:`check_folder`; nothing to check for a data set that is not COCO's JSON.

    Raises:
        InputError: the name is not registered, or its JSON cannot be read.
    """
    if name not in DatasetCatalog:
        raise InputError(
            f"data set {name!r} is not registered{nearest(name, list(DatasetCatalog))}"
        )
    metadata = MetadataCatalog.get(name)
    if metadata.get("evaluator_type") != "coco":
        return {}, []
    if not os.path.exists(metadata.json_file):
        raise InputError(
            f"data set {name!r} needs {metadata.json_file}; Detectron2 looks below the folder "
            "in the environment variable DETECTRON2_DATASETS (default ./datasets)"
        )
    dataset = read_coco(metadata.json_file, sections=["images"])
    return dataset, find_bad_images(dataset["images"], metadata.image_root)


def without_images(
    folder: CocoFolder, dataset: dict[str, Any], bad: Sequence[dict[str, Any]], output: Path
) -> CocoFolder:
    """Write the data set without some images to output/NAME.json, and return it as a folder."""
    bad_ids = {image["id"] for image in bad}
    kept = {
        **dataset,
        "images": [i for i in dataset["images"] if i["id"] not in bad_ids],
        "annotations": [a for a in dataset["annotations"] if a["image_id"] not in bad_ids],
    }
    json_file = output / f"{folder.name}.json"
    json_file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(json_file, json.dumps(kept))
    return replace(folder, json_file=str(json_file))


def register_folders(folders: Sequence[CocoFolder]) -> None:
    """Register folders with Detectron2; one that is registered already must be the same."""
    for folder in folders:
        if folder.name not in DatasetCatalog:
            register_coco_instances(folder.name, {}, folder.json_file, folder.image_root)
        elif MetadataCatalog.get(folder.name).get("json_file") != folder.json_file:
            raise InputError(f"data set {folder.name!r} is registered with another JSON already")
