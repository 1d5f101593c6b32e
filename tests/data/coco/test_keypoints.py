"""Keypoints are as many as their category lists, and mirroring exchanges left and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gn_det import InputError
from gn_det.data.coco import flip_pairs

Normalised = Callable[..., tuple[dict, Any]]
POINTS = [12, 12, 2, 30, 12, 1]


def change(**values: object) -> Callable[[dict], None]:
    def to_keypoints(data: dict) -> None:
        for category in data["categories"]:
            category["keypoints"] = ["l", "r"]
        for annotation in data["annotations"]:
            annotation.update(keypoints=list(POINTS), num_keypoints=2)
        data["annotations"][0].update(values)

    return to_keypoints


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
        (["l", "r", "top"], [("l", "r")]),
        (["Right Ear", "Left Ear"], [("Left Ear", "Right Ear")]),
        (["eye-left", "eye-right"], [("eye-left", "eye-right")]),
        (["leftEye", "rightEye", "nose"], [("leftEye", "rightEye")]),
        (["LeftShoulder", "RightShoulder"], [("LeftShoulder", "RightShoulder")]),
        (["lefteye", "righteye"], [("lefteye", "righteye")]),
        (["eyeL", "eyeR"], [("eyeL", "eyeR")]),
        (["LEye", "REye"], [("LEye", "REye")]),
        (["eye.left", "eye.right", "bright_eye"], [("eye.left", "eye.right")]),
        (["eye (left)", "eye (right)"], [("eye (left)", "eye (right)")]),
        (["left_eye_1", "right_eye_2", "right_eye_1"], [("left_eye_1", "right_eye_1")]),
        (["L", "R"], [("L", "R")]),
        (["left", "top"], []),
        (["a", "b"], []),
    ],
)
def test_left_and_right_are_found_by_name(names: list[str], pairs: list) -> None:
    assert flip_pairs(names) == pairs


@pytest.mark.parametrize(
    ("values", "keypoints", "visible", "mended"),
    [
        ({}, POINTS, 2, 0),
        ({"keypoints": [str(v) for v in POINTS]}, POINTS, 2, 1),
        ({"keypoints": None}, [0] * 6, 0, 1),
        ({"keypoints": []}, [0] * 6, 0, 1),
        ({"num_keypoints": None}, POINTS, 2, 1),
        ({"num_keypoints": 7}, POINTS, 2, 1),
    ],
)
def test_keypoints_that_are_learnt_are_complete(
    normalised: Normalised, values: dict, keypoints: list, visible: int, mended: int
) -> None:
    data, findings = normalised(change(**values), keypoints=True)
    assert data["annotations"][0]["keypoints"] == keypoints
    assert data["annotations"][0]["num_keypoints"] == visible
    assert findings.count("mended") == mended


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keypoints": [1, 2, 2]}, "not as many keypoints as their category .*1, and 2 are listed"),
        ({"keypoints": [1, 2, 2, 4]}, "not three finite numbers each"),
        ({"keypoints": [1, 2, 2, 4, "x", 2]}, "not three finite numbers each"),
        ({"keypoints": "none"}, "not three finite numbers each"),
    ],
)
def test_keypoints_that_do_not_fit_are_refused(
    normalised: Normalised, values: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        normalised(change(**values), keypoints=True)


def test_categories_have_to_list_keypoints_where_they_are_learnt(normalised: Normalised) -> None:
    with pytest.raises(InputError, match="categories list no keypoints, or not all the same"):
        normalised(keypoints=True)
