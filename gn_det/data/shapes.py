"""The shapes set: generated images of circles, triangles and squares in COCO format.

Small enough to learn on two CPU cores in minutes, and with what COCO has: textured backgrounds,
objects of several scales that hide one another, crowds as RLE, images without objects, several
image sizes. As with real classes, form and colour both tell them apart: the hues of a class
scatter around its own.
"""

from __future__ import annotations

import colorsys
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pycocotools.mask as mask_util
from tqdm import tqdm

from gn_det.errors import InputError
from gn_det.files import PARTIAL, make_folder

__all__ = ["CATEGORIES", "draw_image", "draw_object", "generate_shapes"]

CATEGORIES = ("circle", "triangle", "square")

_SIZES = ((128, 128), (128, 160), (160, 128))  # height, width
_EMPTY_FRACTION = 0.05
_CROWD_FRACTION = 0.10
_MIN_VISIBLE = 0.5  # of an object's pixels; one that would be hidden further is not drawn
_MIN_PIXELS = 40


def generate_shapes(
    output: str | Path, num_train: int = 1000, num_val: int = 100, seed: int = 0
) -> Path:
    """Write the shapes set: ``images/``, ``train.json`` and ``val.json``.

    Image i depends on (seed, i) alone. The folder appears when it is complete; one that already
    holds the same set is left as it is.

    Args:
        output: folder to create.
        num_train: images of the training split.
        num_val: images of the held-out split.
        seed: non-negative.

    Returns:
        output.

    Raises:
        InputError: a split without images, a negative seed, or an output folder that holds
            something else or cannot be written.
    """
    output = Path(output)
    settings = {"num_train": num_train, "num_val": num_val, "seed": seed}
    if num_train < 1 or num_val < 1 or seed < 0:
        raise InputError(f"num_train and num_val must be at least 1, seed at least 0: {settings}")
    if output.exists():
        if _settings_of(output) == settings:
            return output
        raise InputError(f"{output} exists and is not the shapes set of {settings}; remove it")

    partial = output.with_name(output.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial / "images")
    splits = {
        "train": range(1, num_train + 1),
        "val": range(num_train + 1, num_train + num_val + 1),
    }
    try:
        for split, image_ids in splits.items():
            dataset = _write_split(partial / "images", image_ids, split, settings)
            (partial / f"{split}.json").write_text(json.dumps(dataset))
        partial.rename(output)
    except OSError as error:
        raise InputError(f"{output} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Draw one image.

    Returns:
        (H, W, 3) uint8 BGR image, and its annotations in COCO's form without ids and image_id.
    """
    height, width = _SIZES[rng.integers(len(_SIZES))]
    image = _texture(rng, height, width, rng.uniform(30, 225, 3), contrast=rng.uniform(4, 22))
    kind = rng.uniform()
    if kind < _EMPTY_FRACTION:
        return _finish(rng, image), []

    owners = np.zeros((height, width), np.int32)  # which object shows at a pixel, 0 for none
    categories = [0]  # category id by owner
    sizes = [0]  # pixels drawn by owner
    for _ in range(rng.integers(1, 6)):
        category = int(rng.integers(1, len(CATEGORIES) + 1))
        mask = _shape_mask(rng, category, height, width, radius=np.exp(rng.uniform(2.5, 3.75)))
        if not _may_draw(mask, owners, sizes):
            continue
        _paint(rng, image, mask, category)
        owners[mask] = len(categories)
        categories.append(category)
        sizes.append(int(mask.sum()))
    annotations = [
        _polygon_annotation(owners == owner, categories[owner])
        for owner in range(1, len(categories))
    ]
    if kind > 1 - _CROWD_FRACTION:
        crowd = _draw_crowd(rng, image, owners)
        if crowd is not None:
            annotations.append(crowd)
    return _finish(rng, image), annotations


def draw_object(rng: np.random.Generator, size: int) -> tuple[np.ndarray, int]:
    """Draw an image of one object.

    Returns:
        (size, size, 3) uint8 BGR image, and the object's place in CATEGORIES.
    """
    image = _texture(rng, size, size, rng.uniform(30, 225, 3), contrast=rng.uniform(4, 22))
    category = int(rng.integers(1, len(CATEGORIES) + 1))
    mask = _shape_mask(rng, category, size, size, radius=size * rng.uniform(0.2, 0.4))
    _paint(rng, image, mask, category)
    return _finish(rng, image), category - 1


def _write_split(
    folder: Path, image_ids: range, split: str, settings: dict[str, int]
) -> dict[str, Any]:
    images, annotations = [], []
    for image_id in tqdm(image_ids, desc=f"shapes, {split}", unit="image"):
        image, drawn = draw_image(np.random.default_rng([settings["seed"], image_id]))
        file_name = f"{image_id:06d}.jpg"
        if not cv2.imwrite(str(folder / file_name), image, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(errno.EIO, "an image could not be written; is the disk full?")
        height, width = image.shape[:2]
        images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        for annotation in drawn:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **annotation})
    return {
        "info": {"description": f"gn_det generated shapes, {split}", "settings": settings},
        "licenses": [],
        "categories": [
            {"id": i, "name": name, "supercategory": "shape"}
            for i, name in enumerate(CATEGORIES, start=1)
        ],
        "images": images,
        "annotations": annotations,
    }


def _settings_of(folder: Path) -> dict[str, int] | None:
    try:
        return json.loads((folder / "train.json").read_text())["info"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _texture(
    rng: np.random.Generator, height: int, width: int, color: np.ndarray, contrast: float
) -> np.ndarray:
    """(H, W, 3) float32: a colour, noise at four scales, and at times stripes or a gradient."""
    texture = np.tile(color.astype(np.float32), (height, width, 1))
    for cells in (3, 8, 20, 64):
        noise = rng.normal(0, contrast / 2, (cells, cells, 3)).astype(np.float32)
        texture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_LINEAR)
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(0.05, 0.6)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along = x * np.cos(angle) + y * np.sin(angle)
    kind = rng.uniform()
    if kind < 0.35:
        texture += contrast * np.sin(frequency * along)[..., None].astype(np.float32)
    elif kind < 0.6:
        texture += (contrast * (along / np.ptp(along) - 0.5))[..., None].astype(np.float32)
    return texture


def _shape_mask(
    rng: np.random.Generator, category: int, height: int, width: int, radius: float
) -> np.ndarray:
    """(H, W) bool: one object at a random place and rotation."""
    canvas = np.zeros((height, width), np.uint8)
    margin = 0.6 * radius  # an object may be cut by the border, but not down to a slice
    center = rng.uniform([margin, margin], [width - margin, height - margin])
    if CATEGORIES[category - 1] == "circle":
        cv2.circle(canvas, center.astype(int).tolist(), max(int(radius), 1), 1, -1)
    else:
        corners = {"triangle": 3, "square": 4}[CATEGORIES[category - 1]]
        angles = rng.uniform(0, 2 * np.pi) + np.arange(corners) * 2 * np.pi / corners
        points = center + radius * 1.2 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
        cv2.fillPoly(canvas, [points.astype(np.int32)], 1)
    return canvas.astype(bool)


def _may_draw(mask: np.ndarray, owners: np.ndarray, sizes: list[int]) -> bool:
    """Whether enough of every object stays visible, and none gets a hole (a polygon has none)."""
    if mask.sum() < _MIN_PIXELS:
        return False
    for owner in np.unique(owners[mask]):
        visible = (owners == owner) & ~mask
        if owner and visible.sum() < max(_MIN_VISIBLE * sizes[owner], _MIN_PIXELS):
            return False
        if owner and _has_hole(visible):
            return False
    return True


def _has_hole(mask: np.ndarray) -> bool:
    _, hierarchy = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return bool((hierarchy[0, :, 3] >= 0).any())  # a contour inside another


def _paint(rng: np.random.Generator, image: np.ndarray, mask: np.ndarray, category: int) -> None:
    hue = (category - 1) / len(CATEGORIES) + rng.normal(0, 0.08)
    rgb = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.4, 1), rng.uniform(0.4, 1))
    color = 255 * np.array(rgb[::-1])
    texture = _texture(rng, *mask.shape, color, contrast=rng.uniform(2, 10))
    image[mask] = texture[mask]


def _finish(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    noisy = image + rng.normal(0, 3, image.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _polygon_annotation(mask: np.ndarray, category: int) -> dict[str, Any]:
    # findContours runs through pixel centres and would shave half a pixel off all around; at
    # twice the size the loss is below COCO's rasterisation, which then returns the very mask.
    doubled = cv2.resize(mask.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, _ = cv2.findContours(doubled, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    polygons = [((c.reshape(-1) + 0.5) / 2).tolist() for c in contours if len(c) >= 3]
    return _annotation(mask, category, polygons, iscrowd=0)


def _draw_crowd(
    rng: np.random.Generator, image: np.ndarray, owners: np.ndarray
) -> dict[str, Any] | None:
    """Draw a cluster of small objects of one class on free ground; annotate it as one crowd."""
    height, width = owners.shape
    category = int(rng.integers(1, len(CATEGORIES) + 1))
    top, left = rng.integers(0, height - 40), rng.integers(0, width - 40)
    crowd = np.zeros_like(owners, bool)
    for _ in range(25):
        mask = np.zeros_like(crowd)
        mask[top : top + 40, left : left + 40] = _shape_mask(rng, category, 40, 40, radius=4.5)
        if not (mask & (owners > 0)).any():
            _paint(rng, image, mask, category)
            crowd |= mask
    if crowd.sum() < _MIN_PIXELS:
        return None
    flat = crowd.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    if flat[0]:  # COCO's runs begin with the background
        counts.insert(0, 0)
    segmentation = {"size": [height, width], "counts": counts}
    return _annotation(crowd, category, segmentation, iscrowd=1)


def _annotation(
    mask: np.ndarray, category: int, segmentation: list | dict, iscrowd: int
) -> dict[str, Any]:
    rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "category_id": category,
        "bbox": mask_util.toBbox(rle).tolist(),
        "area": float(mask_util.area(rle)),
        "iscrowd": iscrowd,
        "segmentation": segmentation,
    }
