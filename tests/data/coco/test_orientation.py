"""Boxes tell whether they were drawn on the turned or on the stored picture."""

from __future__ import annotations

import pytest

from gn_det.data.coco.orientation import drawn_as_stored

# A picture that is stored lying, 160 x 120, and seen upright, 120 x 160.
IMAGES = [{"id": 1, "width": 160, "height": 120}, {"id": 2, "width": 50, "height": 50}]
UPRIGHT = {1: (120, 160)}


@pytest.mark.parametrize(
    ("boxes", "stored"),
    [
        ([[100, 10, 50, 50]], True),  # reaches beyond the upright one
        ([[10, 100, 50, 50]], False),  # reaches beyond the stored one
        ([[10, 10, 50, 50]], True),  # fits both: the size in the JSON decides
        ([[10, 100, 50, 50], [10, 90, 50, 60], [100, 10, 50, 50]], False),
        ([["10", "100", "50", "50"]], False),
        ([None, [1], [float("nan")] * 4], True),
        ([], True),
    ],
)
def test_boxes_that_reach_out_of_a_picture_are_not_of_it(boxes: list, stored: bool) -> None:
    annotations = [{"image_id": "1", "bbox": box} for box in boxes]
    found = drawn_as_stored(IMAGES, [*annotations, None], UPRIGHT)
    assert found == ({1: (160, 120)} if stored else {})


def test_another_size_altogether_is_none_of_a_turn() -> None:
    assert drawn_as_stored(IMAGES, [], {2: (70, 30)}) == {}
