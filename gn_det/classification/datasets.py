"""Classification sets: handwritten digits, generated images, folders, objects of COCO sets.

Their items are :func:`gn_det.classification.crops.sample`. In training sets these are augmented by
the global generators, which :class:`gn_det.data.train_loader.TrainLoader` seeds for each.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from gn_det.classification.crops import ObjectCrops, sample
from gn_det.data.coco.categories import Known
from gn_det.data.pictures import read_picture
from gn_det.data.shapes import CATEGORIES, draw_object
from gn_det.errors import InputError

__all__ = ["Digits", "Folder", "GeneratedImages", "data_settings", "load_images"]


def load_images(
    data: str, size: int | None = None, max_objects: int | None = None
) -> tuple[Dataset, Dataset]:
    """Training and held-out split of a classification set.

    Args:
        data: "digits", "generated", or a folder: with one folder per class in ``train/`` and
            ``val/``, as ImageNet and :class:`torchvision.datasets.ImageFolder` have it, or with
            ``train.json``, ``val.json`` and ``images/`` in COCO format, whose objects are cut out
            (see :class:`gn_det.classification.crops.ObjectCrops`).
        size: side of the images in pixels; default 8 for digits, 224 for folders of classes, 48
            for the others.
        max_objects: of each split, for sets in COCO format; default: all.

    Returns:
        Map-style data sets, each with ``classes``, the names.

    Raises:
        InputError: no such set, the splits have different classes, or max_objects is for another
            kind of set.
    """
    if size is not None and size < 1:
        raise InputError(f"size {size} is below 1 pixel")
    train = _split(data, "train", size, max_objects)
    val = _split(data, "val", size, max_objects, getattr(train, "categories", ()))
    if train.classes != val.classes:
        raise InputError(
            f"{data}: the held-out classes {val.classes} are not the training ones, {train.classes}"
        )
    return train, val


def data_settings(train: Dataset, val: Dataset) -> dict[str, Any]:
    """What tells a classification set from others: its number of training images, and digests.

    A digest is a SHA-256 of the names of the files of a split, with the boxes and classes of their
    objects; None for images that are built in, which are always the same.

    Args:
        train, val: as :func:`load_images` returns them.
    """
    return {
        "training_images": len(train),
        "training_digest": _digest(train),
        "held_out_digest": _digest(val),
    }


def _digest(images: Dataset) -> str | None:
    if isinstance(images, ObjectCrops):
        entries = images.objects
    elif isinstance(images, Folder):
        entries = images.samples
    else:
        return None
    return hashlib.sha256(json.dumps([images.classes, entries]).encode()).hexdigest()


def _split(
    data: str, split: str, size: int | None, max_objects: int | None, known: Known = ()
) -> Dataset:
    named = data in ("digits", "generated")
    in_coco_format = not named and (Path(data) / "train.json").exists()
    if max_objects is not None and not in_coco_format:
        raise InputError(
            f"max_objects {max_objects} is for sets in COCO format, and {data} is none"
        )
    if data == "digits":
        return Digits(split, size or 8)
    if data == "generated":
        return GeneratedImages(split, size or 48)
    folder, augmented = Path(data), split == "train"
    if in_coco_format:
        return ObjectCrops(
            folder / f"{split}.json",
            folder / "images",
            size or 48,
            augmented=augmented,
            known=known,
            max_objects=max_objects,
        )
    return Folder(folder / split, size or 224, augmented=augmented)


class Digits(Dataset):
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels (Alpaydin & Kaynak 1998).

    A fifth of each class is held out, the same one always. Nothing is augmented.

    Args:
        split: "train" or "val".
        size: side in pixels to which they are scaled.
    """

    classes = tuple("0123456789")

    def __init__(self, split: str, size: int = 8) -> None:
        from sklearn.datasets import load_digits  # takes a second
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, val = train_test_split(
            np.arange(len(digits.target)), test_size=0.2, random_state=0, stratify=digits.target
        )
        self._indices = train if split == "train" else val
        self._images = (digits.images * 255 / 16).astype(np.float32)
        self._labels = digits.target
        self.size = size

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._indices[index]
        image = cv2.resize(
            self._images[number], (self.size, self.size), interpolation=cv2.INTER_LINEAR
        )
        return sample(
            np.repeat(image[..., None], 3, axis=2), int(self._labels[number]), f"digit {number}"
        )


class GeneratedImages(Dataset):
    """Images of one generated circle, triangle or square, half of them mirrored in training.

    Image i of a split depends on i alone.

    Args:
        split: "train", of 4,000 images, or "val", of 1,000 others.
        size: side in pixels.
    """

    classes = CATEGORIES

    def __init__(self, split: str, size: int = 48) -> None:
        self.augmented = split == "train"
        self.size = size

    def __len__(self) -> int:
        return 4000 if self.augmented else 1000

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):  # ends a loop over the set
            raise IndexError(index)
        image, label = draw_object(np.random.default_rng([int(self.augmented), index]), self.size)
        if self.augmented and np.random.uniform() < 0.5:
            image = image[:, ::-1]
        return sample(image, label, f"generated image {index}")


class Folder(Dataset):
    """torchvision's ImageFolder with the usual ImageNet augmentation.

    Training images are random parts, of 8% to 100% of the area, and mirrored at random; held-out
    ones are scaled to 256/224 of the size, and their centre is taken.

    Args:
        root: a folder for each class.
        size: side in pixels.
        augmented: whether they are training images.

    Attributes:
        samples: file and index of the class of each image.

    Raises:
        InputError: there are no images of classes; from an item, its file is no image.
    """

    def __init__(self, root: str | os.PathLike[str], size: int, *, augmented: bool) -> None:
        self._transform = T.Compose(
            [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
            if augmented
            else [T.Resize(round(size * 256 / 224)), T.CenterCrop(size)]
        )
        try:
            self._folder = ImageFolder(root, loader=_read)
        except OSError as error:
            raise InputError(
                f"{root} is no classification set: it needs a folder of images for each class. "
                "--data is digits, generated, or a folder with train/ and val/, or with "
                "train.json, val.json and images/"
            ) from error
        self.classes, self.samples = self._folder.classes, self._folder.samples

    def __len__(self) -> int:
        return len(self._folder)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, label = self.samples[index]
        rgb = np.asarray(self._transform(self._folder.loader(file)))
        return sample(rgb[..., ::-1], label, file)


def _read(file: str) -> Image.Image:
    return Image.fromarray(read_picture(file, "RGB"))
