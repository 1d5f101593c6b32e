"""What annotations reach out of tells what they were drawn on."""

from __future__ import annotations

import pytest

from gn_det.data.coco.frames import drawn_as_stored, drawn_at_another_scale

# A picture that is stored lying, 160 x 120, and seen upright, 120 x 160.
STORED, UPRIGHT = {1: (160, 120)}, {1: (120, 160), 2: (7, 7)}


def polygon(x: float, y: float) -> dict:
    return {"segmentation": [[0, 0, x, 0, x, y, 0, y]]}


def rle(height: int, width: int) -> dict:
    return {"segmentation": {"size": [height, width], "counts": "x"}}


@pytest.mark.parametrize(
    ("objects", "stored"),
    [
        ([{"bbox": [100, 10, 50, 50]}], True),
        ([{"bbox": [10, 100, 50, 50]}], False),
        ([{"bbox": ["10", "100", "50", "50"]}], False),
        ([{"bbox": [10, 10, 50, 50]}], None),
        ([{"bbox": [0, y, 50, 50]} for y in (100, 90)] + [{"bbox": [100, 10, 50, 50]}], False),
        ([{"bbox": None}, {"bbox": [1]}, {"bbox": [float("nan")] * 4}, {}], None),
        ([], None),
        ([polygon(50, 150)], False),
        ([{**polygon(150, 50), "bbox": [0, 0, 0, 0]}], True),
        ([{"segmentation": "[[0, 0, 9, 0, 9, 150]]"}], False),
        ([{"segmentation": [[[0, 0], [9, 0], [9, 150]]]}], False),
        ([rle(160, 120)], False),
        ([rle(120, 160)], True),
        ([{"image_id": 2, "bbox": [100, 10, 50, 50]}], None),
    ],
)
def test_objects_that_fit_one_of_both_alone_tell_how_they_were_drawn(
    objects: list[dict], stored: bool | None
) -> None:
    annotations = [{"image_id": "1", **object_} for object_ in objects]
    assert drawn_as_stored(STORED, UPRIGHT, annotations) is stored


@pytest.mark.parametrize(
    ("written", "file", "objects", "scaled"),
    [
        ((80, 60), (160, 120), [polygon(79, 59)], True),
        ((80, 60), (160, 120), [polygon(79, 59), polygon(150, 20)], False),
        ((80, 60), (160, 120), [polygon(79, 59)] * 30 + [polygon(99, 20)], True),  # by mistake
        ((320, 240), (160, 120), [polygon(300, 59)], True),
        ((320, 240), (160, 120), [polygon(150, 59)], False),
        ((80, 60), (160, 120), [], False),
        ((80, 61), (160, 121), [polygon(79, 59)], True),  # rounded
        ((80, 80), (160, 120), [polygon(79, 59)], False),  # of other proportions
        ((161, 121), (160, 120), [polygon(79, 59)], False),  # nearly the same
        ((80, 60), (160, 120), [rle(60, 80)], True),
        ((80, 60), (160, 120), [rle(120, 160)], False),
        ((320, 240), (160, 120), [rle(240, 320)], True),
        ((1000, 800), (950, 760), [polygon(940, 750)] * 80 + [polygon(999, 30)], True),
        ((1000, 800), (950, 760), [polygon(940, 750)] * 80 + [polygon(1999, 30)], False),
        ((1, 1), (160, 160), [polygon(79, 59)], False),  # a size in place of none
    ],
)
def test_objects_of_a_resized_picture_fit_its_former_size(
    written: tuple, file: tuple, objects: list[dict], scaled: bool
) -> None:
    annotations = [{"image_id": 1, **object_} for object_ in objects]
    found = drawn_at_another_scale({1: written}, {1: file}, annotations)
    assert found == ({1} if scaled else set())
