"""Objects that were drawn on a picture of another size, brought to the size of its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util

from gn_det.data.coco.findings import DroppedError, Findings
from gn_det.data.coco.segmentation import normalise_segmentation

__all__ = ["scale_objects"]


def scale_objects(
    dataset: dict[str, Any], file_sizes: Mapping[int, tuple[int, int]], findings: Findings
) -> None:
    """Give pictures the sizes of their files, and scale their objects alike, in place.

    Args:
        dataset: normalised.
        file_sizes: (width, height) by the id of the picture.
        findings: told of each picture, and of objects that have no pixel any more.
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
        number = annotation["image_id"]
        try:
            if number in factors:
                _scale(annotation, *factors[number], file_sizes[number])
            kept.append(annotation)
        except DroppedError as dropped:
            what, value = dropped.args
            findings.add("dropped", what, f"annotation {annotation['id']}", text=value)
    dataset["annotations"] = kept
    findings.check()


def _scale(annotation: dict[str, Any], fx: float, fy: float, size: tuple[int, int]) -> None:
    x, y, w, h = annotation["bbox"]
    annotation["bbox"] = [x * fx, y * fy, w * fx, h * fy]
    annotation["area"] *= fx * fy
    if annotation.get("keypoints"):
        points = np.array(annotation["keypoints"], float).reshape(-1, 3) * (fx, fy, 1)
        annotation["keypoints"] = points.ravel().tolist()
    if annotation.get("segmentation"):
        scaled = _scaled_mask(annotation["segmentation"], fx, fy, size)
        mask = normalise_segmentation(scaled, size[::-1])
        annotation["segmentation"] = mask.segmentation if mask else []


def _scaled_mask(mask: Any, fx: float, fy: float, size: tuple[int, int]) -> Any:
    if isinstance(mask, list):
        return [(np.reshape(p, (-1, 2)) * (fx, fy)).ravel().tolist() for p in mask]
    if isinstance(mask["counts"], list):
        mask = mask_util.frPyObjects(mask, *mask["size"])
    pixels = cv2.resize(mask_util.decode(mask), size, interpolation=cv2.INTER_NEAREST)
    rle = mask_util.encode(np.asfortranarray(pixels))
    return {"size": [size[1], size[0]], "counts": rle["counts"].decode()}
