"""Drawing objects over an image, from COCO-format annotations or results alike."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.utils.visualizer import Visualizer

from gn_det.text import printable

__all__ = ["draw_objects"]


def draw_objects(
    image: np.ndarray,
    objects: Sequence[Mapping[str, Any]],
    names: Mapping[int, str],
    short_side: int = 480,
) -> np.ndarray:
    """Draw masks (boxes where there is none), keypoints and labels, a colour for each class.

    Where there is one class, each object has its own colour and the label is the score alone.

    Args:
        image: (H, W, 3) uint8 RGB.
        objects: with category_id, segmentation or bbox, perhaps keypoints, and score or iscrowd,
            as in COCO.
        names: by category id.
        short_side: pixels that a smaller image is enlarged to, so that labels can be read; a long
            and thin one only until its long side has four times as many.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    short, long = sorted(image.shape[:2])
    scale = max(1.0, min(short_side / short, 4 * short_side / long))
    visualizer = Visualizer(image, Metadata(), scale=scale)
    if not objects:
        return visualizer.output.get_image()
    order = sorted(names)
    if len(names) == 1:
        hues = [index * 0.618 % 1 for index in range(len(objects))]  # neighbours in order far apart
    else:
        # From yellow on: pure red, green and blue are what images often have of their own.
        hues = [(order.index(o["category_id"]) / len(order) + 1 / 6) % 1 for o in objects]
    has_masks = all(o.get("segmentation") for o in objects)
    points = [o.get("keypoints") or [] for o in objects]
    drawn = visualizer.overlay_instances(
        masks=[o["segmentation"] for o in objects] if has_masks else None,
        boxes=None if has_masks else np.array([_corners(o["bbox"]) for o in objects]),
        labels=[_label(o, names) for o in objects],
        keypoints=_as_many(points) if any(points) else None,
        assigned_colors=[colorsys.hsv_to_rgb(hue, 0.9, 1.0) for hue in hues],
        alpha=0.45,
    )
    return drawn.get_image()


def _as_many(keypoints: Sequence[Sequence[float]]) -> np.ndarray:
    """(objects, keypoints, 3), with invisible ones for those that an object lacks."""
    padded = np.zeros((len(keypoints), max(map(len, keypoints)) // 3, 3))
    for row, points in zip(padded, keypoints, strict=True):
        row[: len(points) // 3] = np.reshape(points, (-1, 3))
    return padded


def _label(entry: Mapping[str, Any], names: Mapping[int, str]) -> str:
    # matplotlib would set what stands between dollar signs as mathematics.
    name = printable(names[entry["category_id"]]).replace("$", r"\$") if len(names) > 1 else ""
    if "score" in entry:
        return f"{name} {entry['score']:.0%}".strip()
    return f"{name} (crowd)".strip() if entry.get("iscrowd") else name


def _corners(bbox: Sequence[float]) -> list[float]:
    x, y, width, height = bbox
    return [x, y, x + width, y + height]
