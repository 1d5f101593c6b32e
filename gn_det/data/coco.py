"""Reading and checking COCO-format data before anything trains on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from gn_det.errors import InputError
from gn_det.utils import some

__all__ = ["check_annotations", "find_bad_images", "image_problem", "read_coco"]

_END_MARKERS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}
_TAIL_BYTES = 4096  # some cameras and tools append a few bytes after the end marker
_EXIF_ORIENTATION = 0x0112


_REQUIRED = {
    "images": {"id": int, "file_name": str, "height": (int, float), "width": (int, float)},
    "annotations": {"id": int, "image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}


def read_coco(
    json_file: str | Path, sections: Sequence[str] = ("images", "annotations", "categories")
) -> dict[str, Any]:
    """Read an instances JSON and check that its sections are well formed.

    Args:
        json_file: path of the JSON.
        sections: those that must be there.

    Returns:
        The parsed JSON.

    Raises:
        InputError: no such file, no JSON, or entries without the keys that COCO gives them.
    """
    try:
        dataset = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{json_file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{json_file} is not JSON: {error}") from error
    for section in sections:
        entries = dataset.get(section) if isinstance(dataset, dict) else None
        if not isinstance(entries, list):
            raise InputError(f"{json_file} is not in COCO format: it has no list {section!r}")
        for index, entry in enumerate(entries):
            for key, kind in _REQUIRED[section].items():
                if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                    value = entry.get(key, "nothing") if isinstance(entry, dict) else entry
                    raise InputError(
                        f"{json_file} is not in COCO format: {section}[{index}] has {value!r} "
                        f"for {key!r}"
                    )
        repeated = [i for i, n in Counter(entry["id"] for entry in entries).items() if n > 1]
        if repeated:
            raise InputError(f"{json_file}: ids of {section} occur twice: {some(repeated, 5)}")
    return dataset


def check_annotations(
    dataset: dict[str, Any], json_file: str | Path, *, masks: bool, evaluated: bool
) -> None:
    """Check that every annotation refers to what exists and can be learnt from.

    Args:
        dataset: what :func:`read_coco` returned.
        json_file: named in the error.
        masks: whether each annotation needs a segmentation.
        evaluated: whether each needs the area and iscrowd that COCO's evaluation reads.

    Raises:
        InputError: one line with every kind of problem, how often it occurs and the first ids.
    """
    images = {image["id"]: image for image in dataset["images"]}
    category_ids = {category["id"] for category in dataset["categories"]}
    checks = {
        "belong to an image that is not there": lambda a: a["image_id"] not in images,
        "have a category_id that is not declared": lambda a: a["category_id"] not in category_ids,
        "have a box without area": lambda a: not _has_area(a["bbox"]),
        "have no segmentation (for boxes alone, set MODEL.MASK_ON False)": (
            lambda a: masks and not a.get("segmentation")
        ),
        "have a segmentation that is neither polygons nor an RLE of the image's size": (
            lambda a: (
                masks
                and a.get("segmentation")
                and not _is_mask(a["segmentation"], images.get(a["image_id"]))
            )
        ),
        "have the id 0, which the evaluation takes for no match (number them from 1)": (
            lambda a: evaluated and a["id"] == 0
        ),
        "lack area or iscrowd, which the evaluation needs": (
            lambda a: evaluated and not {"area", "iscrowd"} <= a.keys()
        ),
    }
    problems = []
    for problem, is_bad in checks.items():
        bad = [annotation["id"] for annotation in dataset["annotations"] if is_bad(annotation)]
        if bad:
            problems.append(f"{len(bad)} {problem}: {some(bad, 5)}")
    if not category_ids:
        problems.append("no category is declared")
    if problems:
        raise InputError(f"{json_file}: of the annotations (by id), {'; '.join(problems)}")


def find_bad_images(
    images: Sequence[dict[str, Any]], image_root: str | Path
) -> list[tuple[dict[str, Any], str]]:
    """Find images that training would fail on, without decoding them.

    Args:
        images: the JSON's images.
        image_root: the folder that their file_name is relative to.

    Returns:
        (image, what is wrong) for each that is missing, no image, of another size than the JSON
        says, or truncated.

    Raises:
        InputError: image_root is no folder.
    """

    if not Path(image_root).is_dir():
        raise InputError(f"{image_root} is not a folder of images")

    def problem(image: dict[str, Any]) -> str | None:
        path = Path(image_root) / image["file_name"]
        return image_problem(path, image["height"], image["width"])

    with ThreadPoolExecutor(max_workers=16) as pool:  # waits for the disk, not for the processor
        problems = tqdm(
            pool.map(problem, images),
            total=len(images),
            desc="checking images",
            unit="image",
            delay=2,
        )
        return [(image, p) for image, p in zip(images, problems, strict=True) if p]


def image_problem(path: Path, height: int, width: int) -> str | None:
    """What is wrong with an image file, or None; reads its header and its end."""
    try:
        with Image.open(path) as image:
            kind, size = image.format, image.size
            # Detectron2 turns images upright; PNG would be decoded to look for its EXIF.
            if kind in ("JPEG", "MPO") and image.getexif().get(_EXIF_ORIENTATION, 1) >= 5:
                size = size[::-1]
        with open(path, "rb") as file:
            length = file.seek(0, 2)
            file.seek(max(0, length - _TAIL_BYTES))
            tail = file.read()
    except FileNotFoundError:
        return "missing"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:  # PIL's own OSErrors have none
            return error.strerror
        if isinstance(error, Image.DecompressionBombError):
            return "too large for Pillow to open"
        return "not an image" if path.stat().st_size else "empty"
    if _END_MARKERS.get(kind, b"") not in tail:
        return "truncated"
    if size != (width, height):
        return f"{size[0]}x{size[1]} where the JSON says {width}x{height}"
    return None


def _has_area(bbox: list) -> bool:
    numbers = len(bbox) == 4 and all(isinstance(v, (int, float)) and math.isfinite(v) for v in bbox)
    return numbers and bbox[2] > 0 and bbox[3] > 0


def _is_mask(segmentation: Any, image: dict[str, Any] | None) -> bool:
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        fits = image is None or size == [image["height"], image["width"]]
        return isinstance(counts, (list, str)) and isinstance(size, list) and fits
    return isinstance(segmentation, list) and all(
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(v, (int, float)) for v in polygon)
        for polygon in segmentation
    )
