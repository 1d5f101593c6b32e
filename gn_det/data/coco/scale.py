"""Objects that were drawn on a picture of another size, brought to the size of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from gn_det.data.coco.findings import DroppedError, Findings
from gn_det.data.coco.segmentation import SCRAPS, normalise_segmentation

__all__ = ["scale_objects"]


def scale_objects(
    dataset: dict[str, Any],
    file_sizes: Mapping[int, tuple[int, int]],
    findings: Findings,
    *,
    masks: bool,
) -> None:
    """Give pictures the sizes of their files, and scale their objects alike, in place.

    Args:
        dataset: normalised.
        file_sizes: (width, height) by the id of the picture.
        findings: told of each picture, and of what has no pixel any more.
        masks: whether each annotation needs a mask.
    """
    factors = {}
    for image in dataset["images"]:
        if image["id"] in file_sizes:
            written, size = (image["width"], image["height"]), file_sizes[image["id"]]
            factors[image["id"]] = size[0] / written[0], size[1] / written[1]
            image["width"], image["height"] = size
            what = "images were resized after their objects were drawn: the objects are scaled"
            value = f"{size[0]}x{size[1]}, drawn on {written[0]}x{written[1]}"
            findings.add("mended", what, f"image {image['id']}", text=value)
    kept = []
    for annotation in dataset["annotations"]:
        number, place = annotation["image_id"], f"annotation {annotation['id']}"
        if number not in factors:
            kept.append(annotation)
            continue
        _scale(annotation, *factors[number])
        try:
            _scale_mask(annotation, *factors[number], file_sizes[number], place, findings)
        except DroppedError as dropped:
            what, value = dropped.args
            findings.add("dropped" if masks else "mended", what, place, text=value)
            annotation["segmentation"] = []
        if annotation.get("segmentation") or not masks:
            kept.append(annotation)
    dataset["annotations"] = kept
    findings.check()


def _scale(annotation: dict[str, Any], fx: float, fy: float) -> None:
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x * fx, y * fy, w * fx, h * fy]
    annotation["area"] *= fx * fy
    if annotation.get("keypoints"):
        points = np.array(annotation["keypoints"], float).reshape(-1, 3) * (fx, fy, 1)
        annotation["keypoints"] = points.ravel().tolist()


def _scale_mask(
    annotation: dict[str, Any],
    fx: float,
    fy: float,
    size: tuple[int, int],
    place: str,
    findings: Findings,
) -> None:
    if annotation.get("segmentation"):
        scaled = _scaled_mask(annotation["segmentation"], fx, fy, size)
        mask = normalise_segmentation(scaled, size[::-1])
        annotation["segmentation"] = mask.segmentation if mask else []
        for scrap in mask.scraps if mask else ():
            findings.add("dropped", SCRAPS, place, scrap)


def _scaled_mask(mask: Any, fx: float, fy: float, size: tuple[int, int]) -> Any:
    if isinstance(mask, list):
        return [(np.reshape(p, (-1, 2)) * (fx, fy)).ravel().tolist() for p in mask]
    if isinstance(mask["counts"], list):
        mask = mask_util.frPyObjects(mask, *mask["size"])
    pixels = cv2.resize(mask_util.decode(mask), size, interpolation=cv2.INTER_NEAREST)
    rle = mask_util.encode(np.asfortranarray(pixels))
    return {"size": [size[1], size[0]], "counts": rle["counts"].decode()}
