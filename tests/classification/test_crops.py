"""Objects of a detection set as pictures of a classification set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from gn_det import InputError
from gn_det.classification.crops import ObjectCrops
from gn_det.data.seeding import seed_generators


def crops(folder: Path, *, augmented: bool = False, size: int = 32) -> ObjectCrops:
    return ObjectCrops(folder / "train.json", folder / "images", size, augmented=augmented)


def test_a_crop_is_centred_on_its_object_with_a_quarter_of_its_side_around(
    edit_shapes: Callable,
) -> None:
    def one_square(dataset: dict) -> None:
        dataset["annotations"] = [
            {"id": 1, "image_id": 1, "category_id": 3, "bbox": [40, 30, 40, 40], "iscrowd": 0}
        ]

    folder = edit_shapes(one_square)
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[30:70, 40:80] = (255, 128, 0)  # a square of 40 pixels
    (folder / "images" / "000001.jpg").unlink()
    cv2.imwrite(str(folder / "images" / "000001.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 100])
    dataset = edit_shapes(lambda d: d["images"][0].update(width=128, height=128))
    crop = crops(dataset, size=50)[0]
    pixels = crop["image"]
    assert crop["label"] == 2 and crop["file_name"].endswith("000001.jpg")
    assert pixels.shape == (3, 50, 50) and pixels.dtype == torch.float32
    inside = pixels[:, 8:42, 8:42]
    torch.testing.assert_close(
        inside.mean((1, 2)), torch.tensor([255.0, 128.0, 0.0]), atol=4, rtol=0
    )
    assert pixels[:, :3].max() < 40 and pixels[:, :, -3:].max() < 40


def test_training_crops_depend_on_the_generators_alone_and_held_out_ones_on_nothing(
    shapes: Path,
) -> None:
    dataset = crops(shapes, augmented=True)

    def crop(*seed: int) -> torch.Tensor:
        seed_generators(*seed)
        return dataset[1]["image"]

    once = crop(0, 0)
    assert torch.equal(crop(0, 0), once) and not torch.equal(crop(0, 1), once)
    held_out = crops(shapes)
    assert torch.equal(held_out[1]["image"], held_out[1]["image"])


def test_crowds_are_left_out_and_classes_are_those_of_the_json(edit_shapes: Callable) -> None:
    folder = edit_shapes(lambda d: d["annotations"][0].update(iscrowd=1))
    plain = crops(edit_shapes(lambda d: None))
    assert len(plain) == len(crops(folder)) and plain.classes == ["circle", "triangle", "square"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["annotations"].clear(), "has no annotated object"),
        (lambda d: d["images"][0].update(file_name="gone.jpg"), r"gone\.jpg: missing"),
    ],
)
def test_nothing_to_learn_from_is_an_error(
    edit_shapes: Callable, change: Callable, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        crops(edit_shapes(change))


def test_what_is_mended_is_said_and_classes_are_matched_by_name(
    edit_shapes: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    def other_ids(dataset: dict) -> None:
        for entry in dataset["categories"]:
            entry["id"] += 10
        for annotation in dataset["annotations"]:
            annotation.update(category_id=str(annotation["category_id"] + 10), iscrowd=False)

    folder = edit_shapes(other_ids, split="val")
    train = crops(folder)
    val = ObjectCrops(
        folder / "val.json", folder / "images", 32, augmented=False, known=train.categories
    )
    assert val.classes == train.classes == ["circle", "triangle", "square"]
    assert {label for _, _, label in val.objects} <= {0, 1, 2}
    assert "iscrowd is missing" in val.found and val.found in capsys.readouterr().out


def one_class(dataset: dict) -> None:
    dataset["categories"] = [{"id": 7, "name": "thing"}]
    for annotation in dataset["annotations"]:
        annotation["category_id"] = 7


def test_a_single_class_stands_against_background_that_shows_no_object(
    edit_shapes: Callable,
) -> None:
    dataset = crops(edit_shapes(one_class))
    assert dataset.classes == ["thing", "background"]
    labels = [label for _, _, label in dataset.objects]
    objects, backgrounds = labels.count(0), labels.count(1)
    told = f"{objects} objects have {backgrounds} crops of background" in dataset.found
    assert told == (backgrounds < objects)
    assert 0.5 * objects < backgrounds <= objects  # dense pictures have no free place
    boxes: dict[str, list] = {}
    for file, box, label in dataset.objects:
        boxes.setdefault(file, []).append((box, label))
    for found in boxes.values():
        for x, y, side, _ in (box for box, label in found if label == 1):
            margin = side * 0.125  # of the crop, which shows a quarter more
            for u, v, width, height in (box for box, label in found if label == 0):
                apart_x = u >= x + side + margin - 1e-6 or u + width <= x - margin + 1e-6
                apart_y = v >= y + side + margin - 1e-6 or v + height <= y - margin + 1e-6
                assert apart_x or apart_y
    assert dataset[len(dataset) - 1]["label"] == 1


def test_a_single_class_that_fills_its_pictures_leaves_no_background(
    edit_shapes: Callable,
) -> None:
    def filled(dataset: dict) -> None:
        one_class(dataset)
        sizes = {i["id"]: (i["width"], i["height"]) for i in dataset["images"]}
        for annotation in dataset["annotations"]:
            annotation["bbox"] = [0, 0, *sizes[annotation["image_id"]]]

    with pytest.raises(InputError, match="no place beside its objects that could be background"):
        crops(edit_shapes(filled))


def test_the_most_objects_are_drawn_the_same_way_each_time(edit_shapes: Callable) -> None:
    folder = edit_shapes(lambda d: None)

    def at_most(number: int) -> list:
        file, images = folder / "train.json", folder / "images"
        return ObjectCrops(file, images, 32, augmented=False, max_objects=number).objects

    assert len(at_most(5)) == 5 and at_most(5) == at_most(5)
    assert {str(o) for o in at_most(5)} <= {str(o) for o in crops(folder).objects}
    assert at_most(10**6) == crops(folder).objects
    with pytest.raises(InputError, match="max_objects 0: at least 1"):
        at_most(0)
