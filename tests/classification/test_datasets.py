"""Classification sets."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gn_det import InputError
from gn_det.classification.datasets import load_images
from gn_det.data.seeding import seed_generators


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of 40×30 pictures, blue at the left and red at the right."""
    picture = np.zeros((30, 40, 3), np.uint8)
    picture[:, :20, 0] = picture[:, 20:, 2] = 200
    for split, count in (("train", 3), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                cv2.imwrite(str(tmp_path / split / name / f"{i}.png"), picture)
    return tmp_path


@pytest.mark.parametrize(
    ("data", "sizes", "classes", "size"),
    [("digits", (1437, 360), 10, 8), ("generated", (4000, 1000), 3, 48)],
)
def test_sets_without_a_file(data: str, sizes: tuple, classes: int, size: int) -> None:
    train, val = load_images(data)
    assert (len(train), len(val)) == sizes
    assert len(train.classes) == classes
    sample = val[0]
    assert sample["image"].shape == (3, size, size) and sample["image"].dtype == torch.float32
    assert 0 <= sample["image"].min() and 100 < sample["image"].max() <= 255
    assert torch.equal(sample["image"], val[0]["image"])
    assert {val[i]["label"] for i in range(60)} == set(range(classes))
    assert load_images(data, 20)[0][0]["image"].shape == (3, 20, 20)


def test_no_digit_is_in_both_splits() -> None:
    train, val = load_images("digits")
    names = [{dataset[i]["file_name"] for i in range(len(dataset))} for dataset in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 1797


def test_generated_classes_are_told_apart_by_more_than_chance() -> None:
    _, val = load_images("generated")
    hues = {0: [], 1: [], 2: []}
    for i in range(90):
        sample = val[i]
        hues[sample["label"]].append(sample["image"][:, 20:28, 20:28].mean((1, 2)))
    red, green, blue = (torch.stack(hues[label]).mean(0) for label in (0, 1, 2))
    assert red.argmax() == 2 and green.argmax() == 1 and blue.argmax() == 0  # BGR


def test_a_folder_of_classes_is_imagenets_layout(folder: Path) -> None:
    train, val = load_images(str(folder), 16)
    assert train.classes == ["cat", "dog"] and (len(train), len(val)) == (6, 4)
    sample = val[3]
    assert sample["label"] == 1 and sample["file_name"].endswith("val/dog/1.png")
    left, right = sample["image"][:, 8, 2], sample["image"][:, 8, 13]
    assert left.argmax() == 0 and right.argmax() == 2  # BGR
    seed_generators(0, 0)
    augmented = train[0]["image"]
    assert not torch.equal(train[0]["image"], augmented)
    seed_generators(0, 0)
    assert torch.equal(train[0]["image"], augmented)


def test_objects_of_a_coco_folder(shapes: Path) -> None:
    train, val = load_images(str(shapes), 24)
    assert train.classes == ["circle", "triangle", "square"]
    assert train.augmented and not val.augmented and val[0]["image"].shape == (3, 24, 24)


def test_what_is_no_set_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/train is no classification set.*--data is"):
        load_images(str(tmp_path / "nowhere"))
    (folder / "val" / "cat").rename(folder / "val" / "cow")
    with pytest.raises(InputError, match=r"held-out classes \['cow', 'dog'\] are not"):
        load_images(str(folder))
    with pytest.raises(InputError, match="max_objects 5 is for sets in COCO format, and digits is"):
        load_images("digits", max_objects=5)
    with pytest.raises(InputError, match="size 0 is below 1"):
        load_images("digits", 0)


def test_a_file_that_is_no_picture_is_named(folder: Path) -> None:
    (folder / "val" / "cat" / "0.png").write_text("text")
    _, val = load_images(str(folder))
    with pytest.raises(InputError, match=r"val/cat/0\.png is not an image"):
        val[0]
