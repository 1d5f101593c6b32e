"""The mapper reads with the one reader, and otherwise does what Detectron2's does."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from PIL import Image
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.data import train_loader
from gn_det.data.datasets import CocoFolder, register_folders
from gn_det.data.mapper import PictureMapper
from gn_det.data.seeding import seed_generators
from gn_det.data.train_loader import build_train_loader

YAML = ROOT / "configs/small/quickstart.yaml"


def dicts_of(folder: Path) -> list[dict]:
    from detectron2.data.datasets import load_coco_json

    return load_coco_json(str(folder / "train.json"), str(folder / "images"), "mapped")


@pytest.mark.parametrize("is_train", [True, False])
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_a_sample_is_that_of_detectron2(is_train: bool, mask_format: str, shapes: Path) -> None:
    cfg = load_config(YAML, ["INPUT.MASK_FORMAT", mask_format])
    sample = dicts_of(shapes)[0]
    made = []
    for mapper in (PictureMapper, DatasetMapper):
        seed_generators(3)
        made.append(mapper(cfg, is_train)(copy.deepcopy(sample)))
    ours, theirs = made
    assert ours.keys() == theirs.keys() and torch.equal(ours["image"], theirs["image"])
    assert ("instances" in ours) == is_train
    if is_train:
        fields = (x["instances"].get_fields() for x in made)
        for (name, a), (_, b) in zip(*(sorted(f.items()) for f in fields), strict=True):
            a, b = ((x.tensor if hasattr(x, "tensor") else x) for x in (a, b))
            equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)
            assert equal, name


def test_a_value_range_of_the_config_scales(tmp_path: Path) -> None:
    values = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (64, 1))
    Image.fromarray(values).save(tmp_path / "deep.png")
    sample = {"file_name": str(tmp_path / "deep.png"), "width": 64, "height": 64}
    cfg = load_config(YAML, ["INPUT.VALUE_RANGE", "(0, 4095)", "INPUT.MIN_SIZE_TEST", "0"])
    assert PictureMapper(cfg, is_train=False)(sample)["image"].max() == 255
    assert PictureMapper(load_config(YAML), is_train=False)(sample)["image"].max() == 16


def batches(folder: Path, count: int, *overrides: str, start: int = 0, workers: int = 0) -> list:
    register_folders(
        [CocoFolder("custom_train", str(folder / "train.json"), str(folder / "images"))]
    )
    given = ["DATASETS.TRAIN", "('custom_train',)", "SEED", "3", *overrides]
    loader = build_train_loader(load_config(YAML, [*given, "DATALOADER.NUM_WORKERS", str(workers)]))
    loader.start = start
    iterator = iter(loader)
    try:
        return [[Path(s["file_name"]).name for s in next(iterator)] for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_breaks_after_the_check_is_named(
    workers: int, edit_shapes, tmp_path: Path
) -> None:
    folder = edit_shapes(lambda dataset: None)
    broken = folder / "images" / "000003.jpg"
    broken.unlink()
    broken.write_bytes(b"\xff\xd8 broken")
    message = r"000003\.jpg is not an image; it was whole when the run began.*--skip-bad-images"
    with pytest.raises(InputError, match=message) as raised:
        batches(folder, 6, workers=workers)
    assert "\n" not in str(raised.value)


def test_another_picture_stands_in_for_a_broken_one_the_same_after_resuming(edit_shapes) -> None:
    folder = edit_shapes(lambda dataset: None)
    whole = batches(folder, 9)
    (folder / "images" / "000003.jpg").unlink()
    skip = ("DATALOADER.SKIP_BAD_IMAGES", "True")
    left = batches(folder, 9, *skip)
    assert any("000003.jpg" in batch for batch in whole)
    assert not any("000003.jpg" in batch for batch in left)
    assert batches(folder, 4, *skip, start=5, workers=2) == left[5:]
    for before, after in zip(whole, left, strict=True):
        kept = [name for name in before if name != "000003.jpg"]
        assert [a for a, b in zip(after, before, strict=True) if b != "000003.jpg"] == kept


def test_too_many_broken_pictures_end_the_run(edit_shapes, monkeypatch) -> None:
    monkeypatch.setattr(train_loader, "MOST_BAD_IMAGES", 2)
    folder = edit_shapes(lambda dataset: None)
    for image in list((folder / "images").iterdir())[:5]:
        image.unlink()
    for number in range(1, 7):
        (folder / "images" / f"{number:06}.jpg").unlink(missing_ok=True)
    with pytest.raises(InputError, match="more than 2 pictures cannot be read any more, such as"):
        batches(folder, 9, "DATALOADER.SKIP_BAD_IMAGES", "True")
