"""Predictions beside ground truth."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.figure import Figure

from gn_det import InputError
from gn_det.plots.contact_sheet import contact_sheet
from gn_det.plots.overlay import draw_objects

NAMES = {1: "circle", 2: "triangle"}


def test_keypoints_are_drawn() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    person = {"category_id": 1, "bbox": [10, 10, 60, 60], "score": 0.9}
    points = {"keypoints": [20, 20, 2, 50, 50, 2, 0, 0, 0]}
    without, drawn = (draw_objects(image, [o], NAMES) for o in (person, {**person, **points}))
    changed = np.argwhere((without != drawn).any(-1)) * 100 / drawn.shape[0]
    assert len(changed)
    near = np.abs(changed[:, None] - np.array([[20, 20], [50, 50]])).max(-1).min(-1)
    assert near.max() < 4  # and none at the corner, where the one is that is not visible


def test_objects_may_have_other_numbers_of_keypoints_or_none() -> None:
    image = np.zeros((100, 100, 3), np.uint8)
    entry = {"category_id": 1, "bbox": [10, 10, 60, 60], "score": 0.9}
    objects = [entry, {**entry, "keypoints": [20, 20, 2]}, {**entry, "keypoints": [30, 30, 2] * 4}]
    assert draw_objects(image, objects, NAMES).any()


@pytest.mark.parametrize("num_images", [1, 3, 50])
def test_the_sheet_has_truth_and_predictions_of_as_many_images_as_there_are(
    shapes: Path, tmp_path: Path, num_images: int, figures: list[Figure]
) -> None:
    (tmp_path / "results.json").write_text("[]")
    contact_sheet(
        shapes / "val.json", shapes / "images", tmp_path / "results.json", tmp_path / "sheet.png",
        num_images=num_images,
    )  # fmt: skip
    titles = [axes.get_title() for axes in figures[0].axes if axes.get_title()]
    shown = min(num_images, 3)
    assert len([title for title in titles if title.endswith(": ground truth")]) == shown
    assert titles.count("predictions, score ≥ 0.5") == shown
    assert all(axes.images for axes in figures[0].axes if axes.get_title())


def test_predictions_below_the_threshold_are_left_out(shapes: Path, tmp_path: Path) -> None:
    dataset = json.loads((shapes / "val.json").read_text())
    guess = {"bbox": [10, 10, 60, 60], "category_id": 1}
    sheets = []
    for score in (0.4, 0.6):
        results = [{**guess, "image_id": i["id"], "score": score} for i in dataset["images"]]
        (tmp_path / "results.json").write_text(json.dumps(results))
        contact_sheet(
            shapes / "val.json", shapes / "images", tmp_path / "results.json", tmp_path / "s.png"
        )
        sheets.append(cv2.imread(str(tmp_path / "s.png")))
    assert np.abs(sheets[0].astype(int) - sheets[1]).max() > 50


def test_results_that_cannot_be_read_are_refused(shapes: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        contact_sheet(
            shapes / "val.json", shapes / "images", tmp_path / "nowhere.json", tmp_path / "s.png"
        )


@pytest.mark.parametrize(
    "entry",
    [
        {"segmentation": [[10, 10, 50, 10, 50, 50, 10, 50]]},
        {"segmentation": {"size": [64, 64], "counts": [650, 800, 2646]}, "iscrowd": 1},
        {"bbox": [10, 10, 40, 40], "score": 0.9},
    ],
)
def test_polygons_crowds_and_boxes_are_drawn_where_they_are(entry: dict) -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    drawn = draw_objects(picture, [{"category_id": 1, **entry}], NAMES, short_side=64)
    assert drawn.shape == picture.shape
    assert drawn[8:54, 8:54].max() > 100 and drawn[58:, 58:].max() == 0


def test_small_pictures_are_enlarged_and_large_ones_kept() -> None:
    small, large = np.zeros((50, 100, 3), np.uint8), np.zeros((500, 600, 3), np.uint8)
    assert draw_objects(small, [], NAMES).shape == (480, 960, 3)
    assert draw_objects(large, [], NAMES).shape == (500, 600, 3)
    thin = np.zeros((3, 3000, 3), np.uint8)
    assert draw_objects(thin, [], NAMES).shape == (3, 3000, 3)
    assert draw_objects(thin[:, :100], [], NAMES).shape[1] == 1920
