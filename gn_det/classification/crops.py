"""Objects of a COCO-format data set, cut out: a classification set of the same images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.utils import comm
from torch.utils.data import Dataset

from gn_det.data.coco.categories import Known
from gn_det.data.datasets import CheckedFolder, CocoFolder, read_folder
from gn_det.data.pictures import read_picture
from gn_det.errors import InputError
from gn_det.text import printable

__all__ = ["ObjectCrops", "sample"]

# File, box in XYWH pixels, and index of the class.
Object = tuple[str, list[float], int]

_BACKGROUND = "background"
_CONTEXT = 1.25  # side of a crop in sides of its object
_TRIES = 20  # to find a place without objects


class ObjectCrops(Dataset):
    """Crops around the objects of a COCO-format data set, and their classes.

    Where the data set has one class, "background" is the other: for each object a crop of the same
    size, drawn by chance in the same picture, that shows no object before it is augmented; none
    where chance finds no place. Crowds are left out. What is mended or dropped in the annotations
    is printed in the main process.

    Args:
        json_file, image_root: the data set.
        size: side of an image in pixels.
        augmented: whether a crop is mirrored, shifted and scaled at random, by NumPy's generator.
        known: (id, name) of the categories of the training split; () for that split itself.
        max_objects: the most objects, drawn by chance, always the same; None (default) for all.

    Attributes:
        categories: (id, name) of the categories.
        classes: the names, and "background" beside a single one.
        objects: file, box in XYWH pixels and index of the class of each crop.
        found: a table of what was mended, dropped and warned of; "" for nothing.

    Raises:
        InputError: bad annotations or images, or no objects.
    """

    def __init__(
        self,
        json_file: str | Path,
        image_root: str | Path,
        size: int,
        *,
        augmented: bool,
        known: Known = (),
        max_objects: int | None = None,
    ) -> None:
        if max_objects is not None and max_objects < 1:
            raise InputError(f"max_objects {max_objects}: at least 1")
        checked = _read(json_file, image_root, known)
        dataset = checked.dataset
        self.categories = sorted((c["id"], c["name"]) for c in dataset["categories"])
        self.classes = [name for _, name in self.categories]
        index_of = {number: i for i, (number, _) in enumerate(self.categories)}
        files = {i["id"]: str(Path(image_root) / i["file_name"]) for i in dataset["images"]}
        self._sizes = {files[i["id"]]: (i["width"], i["height"]) for i in dataset["images"]}
        self.objects: list[Object] = [
            (files[a["image_id"]], a["bbox"], index_of[a["category_id"]])
            for a in dataset["annotations"]
            if not a["iscrowd"]
        ]
        total, crowds = len(dataset["annotations"]), len(dataset["annotations"]) - len(self.objects)
        if not self.objects:
            raise InputError(f"{json_file} has no annotated object, and {crowds} crowds")
        if crowds:
            what = f"{crowds} of {total} objects are crowds and are left out"
            checked.findings.add("warned", what, "annotations", count=crowds)
        draw = np.random.default_rng(0)
        if max_objects is not None and max_objects < len(self.objects):
            chosen = draw.choice(len(self.objects), max_objects, replace=False)
            self.objects = [self.objects[i] for i in sorted(chosen)]
        if len(self.classes) == 1:
            boxes: dict[str, list[list[float]]] = defaultdict(list)
            for a in dataset["annotations"]:
                boxes[files[a["image_id"]]].append(a["bbox"])
            background = [*_background(self.objects, boxes, self._sizes, draw)]
            if not background:
                raise InputError(
                    f"{json_file} has one class, {printable(self.classes[0])}, and no place beside "
                    "its objects that could be background"
                )
            if len(background) < len(self.objects):
                what = (
                    f"{len(self.objects)} objects have {len(background)} crops of background: "
                    "chance found no other place"
                )
                checked.findings.add("warned", what, "images")
            self.classes.append(_BACKGROUND)
            self.objects += background
        self.found = checked.findings.table()
        if self.found and comm.is_main_process():
            print(f"\nFound in {json_file}:\n\n{self.found}\n")
        self.size = size
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, (x, y, width, height), label = self.objects[index]
        center, side = np.array([x + width / 2, y + height / 2]), _CONTEXT * max(width, height)
        mirrored = False
        if self.augmented:
            center += np.random.uniform(-0.1, 0.1, 2) * side
            side *= np.exp(np.random.uniform(-0.2, 0.2))
            mirrored = np.random.uniform() < 0.5
        scale = self.size / side
        shift = self.size / 2 - scale * center
        crop = cv2.warpAffine(
            read_picture(file, size=self._sizes[file]),
            np.array([[scale, 0, shift[0]], [0, scale, shift[1]]]),
            (self.size, self.size),
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REFLECT,
        )
        if mirrored:
            crop = crop[:, ::-1]
        return sample(crop, label, file)


def _read(json_file: str | Path, image_root: str | Path, known: Known) -> CheckedFolder:
    """A data set whose images are all usable."""
    checked = read_folder(CocoFolder("", str(json_file), str(image_root)), masks=False, known=known)
    if checked.bad_images:
        bad = checked.bad_images
        image, problem = bad[0]
        raise InputError(
            f"{json_file}: {len(bad)} of {len(checked.dataset['images'])} images in {image_root} "
            f"are unusable, such as {printable(image['file_name'])}: {problem}"
        )
    return checked


def _background(
    objects: Sequence[Object],
    boxes: Mapping[str, list[list[float]]],
    sizes: Mapping[str, tuple[int, int]],
    draw: np.random.Generator,
) -> Iterator[Object]:
    """For each object a place of its size without objects in its picture, of class 1.

    Args:
        objects: to make up for.
        boxes, sizes: of each picture, crowds included.
        draw: of chance.
    """
    for file, like, _ in objects:
        if box := _place_without(boxes[file], like, sizes[file], draw):
            yield file, box, 1


def _place_without(
    boxes: list[list[float]], like: list[float], size: tuple[int, int], draw: np.random.Generator
) -> list[float] | None:
    """A square as large as a box whose crop touches no box; None where chance found none.

    Args:
        boxes: in XYWH pixels.
        like: one of them.
        size: width and height of the picture.
        draw: of chance.
    """
    side = max(like[2:])
    crop = _CONTEXT * side
    room = np.array(size) - crop
    if room.min() < 0:
        return None
    x, y, width, height = np.array(boxes).T
    for left, top in draw.uniform(size=(_TRIES, 2)) * room:
        apart = (x >= left + crop) | (y >= top + crop) | (x + width <= left) | (y + height <= top)
        if apart.all():
            margin = (crop - side) / 2
            return [left + margin, top + margin, side, side]
    return None


def sample(image: np.ndarray, label: int, file_name: str) -> dict[str, Any]:
    """A sample of a classification set.

    Args:
        image: (H, W, 3) BGR with values from 0 to 255.
        label: index of its class.
        file_name: where the image is from, named in errors.

    Returns:
        ``image``, a (3, H, W) float32 tensor, ``label`` and ``file_name``.
    """
    image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    return {"image": image, "label": label, "file_name": file_name}
