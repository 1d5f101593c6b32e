"""The generated set has what COCO has, and is the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pycocotools.mask as mask_util
import pytest
from pycocotools.coco import COCO

from gn_det import InputError
from gn_det.data.bad_images import find_bad_images
from gn_det.data.coco import Findings, normalise_images, normalise_objects, read_coco
from gn_det.data.shapes import CATEGORIES, draw_image, generate_shapes


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, list[dict]]]:
    return [draw_image(np.random.default_rng([0, i])) for i in range(150)]


def test_the_folder_is_coco_format_without_fault(shapes: Path) -> None:
    for split, count in (("train", 6), ("val", 3)):
        findings = Findings(split)
        dataset = read_coco(shapes / f"{split}.json", findings=findings)
        normalise_images(dataset, shapes / "images", findings)
        dataset = normalise_objects(dataset, findings, masks=True)
        assert not findings.changed and findings.table() == ""
        assert find_bad_images(dataset["images"], shapes / "images") == []
        assert len(COCO(shapes / f"{split}.json").imgs) == count


def test_the_splits_share_no_image(shapes: Path) -> None:
    train, val = (read_coco(shapes / f"{split}.json")["images"] for split in ("train", "val"))
    assert not {i["file_name"] for i in train} & {i["file_name"] for i in val}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        generate_shapes(tmp_path / name, num_train=2, num_val=1, seed=seed)
    for file in ("train.json", "val.json", "images/000001.jpg"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c


def test_an_image_does_not_depend_on_how_many_there_are(shapes: Path, tmp_path: Path) -> None:
    generate_shapes(tmp_path / "fewer", num_train=1, num_val=1)
    ours, theirs = (f / "images" / "000002.jpg" for f in (tmp_path / "fewer", shapes))
    assert ours.read_bytes() == theirs.read_bytes()


def test_there_are_classes_scales_sizes_crowds_empties_and_occlusion(drawn: list) -> None:
    objects = [a for _, annotations in drawn for a in annotations if not a["iscrowd"]]
    crowds = [a for _, annotations in drawn for a in annotations if a["iscrowd"]]
    assert set(Counter(a["category_id"] for a in objects)) == {1, 2, 3} and len(CATEGORIES) == 3
    sides = [a["area"] ** 0.5 for a in objects]
    assert min(sides) < 16 and max(sides) > 48
    assert len({image.shape for image, _ in drawn}) == 3
    assert crowds and all(isinstance(a["segmentation"]["counts"], list) for a in crowds)
    assert sum(not annotations for _, annotations in drawn) >= 3
    filled = [a["area"] / (a["bbox"][2] * a["bbox"][3]) for a in objects if a["category_id"] == 1]
    assert min(filled) < 0.7  # of circles (π/4 = 0.79 in full view), some are partly hidden


def test_backgrounds_are_textured(drawn: list) -> None:
    empty = [image for image, annotations in drawn if not annotations]
    assert all(image.std(axis=(0, 1)).min() > 2 for image in empty)


def test_segmentations_rasterise_to_the_area_and_box_beside_them(drawn: list) -> None:
    for image, objects in drawn[:40]:
        height, width = image.shape[:2]
        for annotation in objects:
            rle = mask_util.frPyObjects(annotation["segmentation"], height, width)
            mask = rle if isinstance(rle, dict) else mask_util.merge(rle)
            assert mask_util.area(mask) == annotation["area"]
            assert mask_util.toBbox(mask).tolist() == annotation["bbox"]


def test_no_pixel_belongs_to_two_objects(drawn: list) -> None:
    for image, objects in drawn[:40]:
        height, width = image.shape[:2]
        covered = np.zeros((height, width), int)
        for annotation in objects:
            rle = mask_util.frPyObjects(annotation["segmentation"], height, width)
            mask = rle if isinstance(rle, dict) else mask_util.merge(rle)
            covered += mask_util.decode(mask)
        assert covered.max(initial=0) <= 1


def test_a_finished_set_is_kept_and_another_is_not_overwritten(tmp_path: Path) -> None:
    folder = generate_shapes(tmp_path / "shapes", num_train=1, num_val=1)
    before = (folder / "train.json").stat().st_mtime_ns
    generate_shapes(folder, num_train=1, num_val=1)
    assert (folder / "train.json").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"exists and is not the shapes set.*'num_train': 2"):
        generate_shapes(folder, num_train=2, num_val=1)


def test_an_interrupted_generation_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imwrite", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    assert list(tmp_path.iterdir()) == []
    generate_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    assert len(list((tmp_path / "shapes" / "images").iterdir())) == 3
    assert json.loads((tmp_path / "shapes" / "val.json").read_text())["images"]


def test_a_disk_that_fills_up_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imwrite", lambda *args: False)
    with pytest.raises(InputError, match="shapes cannot be written: .* is the disk full"):
        generate_shapes(tmp_path / "shapes", num_train=2, num_val=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_impossible_settings_are_refused(tmp_path: Path, settings: tuple) -> None:
    with pytest.raises(InputError, match="at least 1"):
        generate_shapes(tmp_path / "shapes", *settings)
