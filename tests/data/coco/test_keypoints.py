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
        ({"keypoints": [12, 12, 5, 30, 12, 1]}, "another visibility than 0, 1 and 2"),
        ({"keypoints": [12, 12, -1, 30, 12, 1]}, "another visibility than 0, 1 and 2"),
        ({"keypoints": [12, 12, 0.5, 30, 12, 1]}, "another visibility than 0, 1 and 2"),
        ({"keypoints": [1e300, 12, 2, 30, 12, 1]}, "far outside of .* in a picture of 80x60"),
        ({"keypoints": [12, 12, 0, 161, 12, 1]}, "far outside of their picture"),
        ({"keypoints": [12, -61, 2, 30, 12, 1]}, "far outside of their picture"),
    ],
)
def test_keypoints_that_do_not_fit_are_refused(
    normalised: Normalised, values: dict, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        normalised(change(**values), keypoints=True)


@pytest.mark.parametrize(
    ("keypoints", "what"),
    [
        ([82, 12, 2, 30, 12, 1], "keypoints lie outside of their picture"),
        ([12, 12, 2, 30, -5, 1], "keypoints lie outside of their picture"),
        ([0.2, 0.3, 2, 0.5, 0.3, 1], "keypoints look like fractions of their picture"),
        ([0.2, 0.3, 2, 500, 12, 0], "keypoints look like fractions of their picture"),
        ([-0.5, 0, 2, 80, 60.9, 1], ""),
        ([1e300, -5000, 0, 30, 12, 1], ""),
        ([0.2, 0.3, 0, 30, 12, 2.0], ""),
        ([0, 0, 2, 30, 12, 2], ""),
        ([0, 0, 0, 0, 0, 0], ""),
    ],
)
def test_keypoints_that_are_probably_not_meant_are_warned_of(
    normalised: Normalised, keypoints: list, what: str
) -> None:
    data, findings = normalised(change(keypoints=keypoints), keypoints=True)
    assert data["annotations"][0]["keypoints"] == keypoints
    assert findings.count("warned") == bool(what) and what in findings.sentence("warned")


def test_keypoints_of_fractions_are_refused_where_most_are(normalised: Normalised) -> None:
    def to_fractions(data: dict) -> None:
        change()(data)
        for annotation in data["annotations"][1:]:
            annotation["keypoints"] = [0.2, 0.3, 2, 0.5, 0.3, 1]

    with pytest.raises(InputError, match="3 keypoints look like fractions of their picture: mul"):
        normalised(to_fractions, keypoints=True)


def test_categories_have_to_list_keypoints_where_they_are_learnt(normalised: Normalised) -> None:
    with pytest.raises(InputError, match="categories list no keypoints, or not all the same"):
        normalised(keypoints=True)
