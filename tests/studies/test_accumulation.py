"""Two batches of one picture against one batch of both: what differs, and that it is all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from gn_det import InputError, get_config
from gn_det.data.datasets import CocoFolder, register_folders
from gn_det.studies.accumulation import (
    Pair,
    accumulation_rows,
    is_padded,
    padding_rows,
    training_pairs,
)

FEW = ["MODEL.RPN.PRE_NMS_TOPK_TRAIN", 100, "MODEL.RPN.POST_NMS_TOPK_TRAIN", 40]
FEW += ["MODEL.RPN.POST_NMS_TOPK_TEST", 40, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 16]
FEW += ["DATALOADER.ASPECT_RATIO_GROUPING", False]  # so that some of few pictures differ in size
# The quickstart's model with another norm in its body, and none elsewhere.
OTHER_NORM = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.RESNETS.NORM"]


def config(folder: Path, *overrides: object) -> CfgNode:
    """The small Mask R-CNN with few proposals, and a folder's training split."""
    register_folders(
        [CocoFolder("custom_train", str(folder / "train.json"), str(folder / "images"))]
    )
    cfg = get_config("small/quickstart.yaml")
    cfg.merge_from_list([*FEW, *overrides])
    cfg.MODEL.DEVICE, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "cpu", 3
    cfg.DATASETS.TRAIN = ("custom_train",)
    return cfg


def model_and_pair(folder: Path, *overrides: object) -> tuple[nn.Module, list[Pair], list[Pair]]:
    """A random model and one pair that is padded, as training has it and resized."""
    cfg = config(folder, *overrides)
    pairs, resized = training_pairs(cfg, 32, most=1)
    assert is_padded(pairs[0])
    return build_model(cfg), pairs, resized


@pytest.mark.slow
def test_gn_accumulates_to_rounding_once_every_cause_is_gone(shapes: Path) -> None:
    model, pairs, resized = model_and_pair(shapes)
    weights = copy.deepcopy(model.state_dict())
    as_it_trains, kept, unpadded, by_image, in_float64 = accumulation_rows(model, pairs, resized)

    assert as_it_trains["accumulated"] > 0.05 and as_it_trains["sampled anew"] > 0.05
    # Nothing is sampled any more, and padding and losses still differ, in all parts.
    assert kept["sampled anew"] < 1e-5
    assert all(kept[part] > 1e-3 for part in ("backbone", "RPN", "box head", "mask head"))
    # RPN's losses are means over images; those of the heads are not.
    assert unpadded["RPN"] < 1e-5 < 1e-4 < unpadded["mask head"]
    # In float32 rounding may switch a ReLU.
    assert by_image["accumulated"] < 1e-2 and by_image["RPN"] < 1e-5
    assert in_float64["accumulated"] < 1e-12

    assert model.roi_heads.batch_size_per_image == 16
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


@pytest.mark.slow
def test_bn_does_not(shapes: Path) -> None:
    rows = accumulation_rows(*model_and_pair(shapes, *OTHER_NORM, "BN"))
    assert rows[-1]["sampled anew"] < 1e-12 < 0.05 < rows[-1]["accumulated"]


def test_padding_changes_gns_features_everywhere_and_frozen_bns_near_it(shapes: Path) -> None:
    model, pairs, _ = model_and_pair(shapes)
    frozen, _, _ = model_and_pair(shapes, *OTHER_NORM, "FrozenBN")
    (gn, alike), (frozen_bn, _) = padding_rows(model, pairs), padding_rows(frozen, pairs)
    assert (gn["beside"], gn["images"]) == ("another size", 2)
    assert gn["padding"] == pytest.approx(0.2)  # 128×160 and 160×128 in 160×160
    assert gn["top left"] > 0.1 and frozen_bn["top left"] < gn["top left"] / 3
    assert frozen_bn["features"] > 1e-3  # the padding is zeros, but not the maps there
    assert 0 < gn["scores, median"] <= gn["scores, largest"]
    assert (alike["beside"], alike["padding"]) == ("itself", 0) and alike["features"] < 1e-5
    assert model.training


def test_equal_pictures_change_nothing_for_each_other(shapes: Path) -> None:
    model, _, resized = model_and_pair(shapes)
    (row,) = padding_rows(model, resized)
    assert (row["beside"], row["images"], row["padding"]) == ("itself", 2, 0)
    assert row["features"] < 1e-5 and row["scores, largest"] < 1e-4


def test_pairs_are_those_of_training_and_once_more_without_padding(shapes: Path) -> None:
    cfg = config(shapes)
    pairs, resized = training_pairs(cfg, 32, most=3)
    again, _ = training_pairs(cfg, 32, most=3)
    assert len(pairs) == len(resized) == 3
    padded = [is_padded(pair) for pair in pairs]
    assert padded == sorted(padded, reverse=True)
    for pair, equal, same in zip(pairs, resized, again, strict=True):
        files = [picture["file_name"] for picture in pair]
        assert len(set(files)) == 2
        assert files == [picture["file_name"] for picture in equal]
        assert {picture["image"].shape[-2:] for picture in equal} == {(128, 128)}
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(pair, same, strict=True))
        assert all(
            len(a["instances"]) == len(b["instances"]) for a, b in zip(pair, equal, strict=True)
        )


def test_the_common_size_needs_no_padding_by_the_backbone(shapes: Path) -> None:
    _, resized = training_pairs(config(shapes), 96, most=1)
    assert {picture["image"].shape[-2:] for picture in resized[0]} == {(192, 192)}


def test_a_picture_is_no_pair(edit_shapes: Callable[..., Path]) -> None:
    def keep_one(dataset: dict) -> None:
        first = dataset["annotations"][0]["image_id"]
        dataset["images"] = [i for i in dataset["images"] if i["id"] == first]
        dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] == first]

    with pytest.raises(InputError, match="custom_train has no two images"):
        training_pairs(config(edit_shapes(keep_one)), 32)


def test_a_model_that_samples_no_proposals_is_refused() -> None:
    with pytest.raises(InputError, match="Linear has no RPN"):
        accumulation_rows(nn.Linear(1, 1), [], [])
