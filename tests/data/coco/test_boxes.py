"""Boxes that train quietly to nothing are warned of, with their number and the first of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gn_det import InputError

CORNERS = "boxes look like corners"
FRACTIONS = "boxes look like fractions"
REACH_OUT = "boxes reach out of their picture"
NOT_OF_MASK = "boxes are not those of their masks"
KINDS = {CORNERS, FRACTIONS, REACH_OUT, NOT_OF_MASK}


@pytest.mark.parametrize(
    ("boxes", "masks", "kind", "count"),
    [
        ([[10, 10, 40, 40]] * 4, True, CORNERS, 4),
        ([[10, 10, 40, 40]] + [[10, 10, 30, 30]] * 3, True, CORNERS, 1),
        ([[30, 30, 60, 50], [50, 10, 70, 50], [1, 2, 3, 4], [9, 9, 20, 20]], False, CORNERS, 2),
        ([[30, 30, 60, 50], [50, 10, 70, 50], [40, 40, 3, 4], [9, 9, 2, 2]], False, REACH_OUT, 2),
        ([[60, 10, 30, 30], [0, 0, 5, 5], [0, 0, 5, 5], [0, 0, 5, 5]], False, REACH_OUT, 1),
        ([[-5, 10, 30, 30], [0, 0, 5, 5], [0, 0, 5, 5], [0, 0, 5, 5]], False, REACH_OUT, 1),
        ([[10, 10, 75, 55], *[[10, 10, 30, 30]] * 3], True, REACH_OUT, 1),
        ([[0.1, 0.2, 0.3, 0.4]] * 2 + [[10, 10, 30, 30]] * 2, False, FRACTIONS, 2),
        ([[0.125, 0.17, 0.375, 0.5]] * 2 + [[10, 10, 30, 30]] * 2, True, FRACTIONS, 2),
        ([[30, 20, 30, 30]] * 4, True, NOT_OF_MASK, 4),
        ([[10, 10, 30, 30]] * 4, True, None, 0),
        ([[9, 8, 32, 33]] * 4, True, None, 0),
        ([[-0.5, 0, 80.4, 60.5]] * 4, False, None, 0),
    ],
)
def test_boxes_that_are_probably_not_meant_are_counted(
    normalised: Callable, boxes: list, masks: bool, kind: str | None, count: int
) -> None:
    def change(data: dict) -> None:
        for annotation, box in zip(data["annotations"], boxes, strict=True):
            annotation["bbox"] = box
            if not masks:
                annotation["segmentation"] = []

    data, findings = normalised(change, masks=masks)
    assert [a["bbox"] for a in data["annotations"]] == boxes and not findings.changed
    assert findings.count("warned") == count
    assert {k for k in KINDS if k in findings.table()} == ({kind} if kind else set())
    assert not count or "annotation 1" in findings.table()


@pytest.mark.parametrize("masks", [True, False])
def test_a_set_of_fractions_is_refused(normalised: Callable, masks: bool) -> None:
    def to_fractions(annotation: dict) -> None:
        annotation.update(bbox=[0.1, 0.2, 0.3, 0.4], segmentation=[[0.1, 0.2, 0.4, 0.2, 0.4, 0.6]])

    with pytest.raises(InputError, match=f"4 {FRACTIONS} of their picture: multiply what"):
        normalised(each=to_fractions, masks=masks)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([None] * 4, "4 polygons look like fractions of their picture: multiply what"),
        ([[0, 0, 0, 0]] * 4, "4 polygons look like fractions"),
        ([[10, 10, 30, 30]] * 2 + [None] * 2, "4 polygons look like fractions"),
        ([[0.1, 0.2, 0.3, 0.4]] * 3 + [None], "3 boxes look like .*; 4 polygons look like"),
    ],
)
@pytest.mark.parametrize("polygon", [[0.1, 0.2, 0.4, 0.2, 0.4, 0.6], [[0.1, 0], [0.4, 0], [1, 1]]])
def test_masks_of_fractions_are_refused(
    normalised: Callable, boxes: list, message: str, polygon: list
) -> None:
    def change(data: dict) -> None:
        for annotation, box in zip(data["annotations"], boxes, strict=True):
            annotation.update(bbox=box, segmentation=[polygon])

    with pytest.raises(InputError, match=message):
        normalised(change)
    if not any(map(any, filter(None, boxes))):
        with pytest.raises(InputError, match=message):
            normalised(change, masks=False)


def test_a_few_masks_of_fractions_are_warned_of(normalised: Callable) -> None:
    def to_fractions(annotation: dict) -> None:
        annotation.update(bbox=None, segmentation=[[0, 0, 1, 0, 1, 1, 0, 1]])

    data, findings = normalised(first=to_fractions)
    assert data["annotations"][0]["bbox"] == [0, 0, 1, 1] and findings.count("warned") == 1
    assert "polygons look like fractions" in findings.sentence("warned")


@pytest.mark.parametrize("masks", [True, False])
def test_fractions_that_nothing_learns_are_no_finding(normalised: Callable, masks: bool) -> None:
    def to_fractions(annotation: dict) -> None:
        annotation["keypoints"] = [0.1, 0.2, 2]
        if not masks:
            annotation["segmentation"] = [[0.1, 0.2, 0.3, 0.2, 0.3, 0.4]]

    _, findings = normalised(each=to_fractions, masks=masks)
    assert findings.count("warned") == 0


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 1e200, 1e200],
        [0, 0, 160.5, 10],
        [10, 10, 30, 111],
        [-81, 0, 100, 10],
    ],
)
def test_a_box_far_out_of_its_picture_is_refused_or_that_of_its_mask(
    normalised: Callable, box: list
) -> None:
    def change(annotation: dict) -> None:
        annotation.update(bbox=box, area=None)

    with pytest.raises(InputError, match=r"1 boxes reach far out .*\] in a picture of 80x60"):
        normalised(each=lambda a: a.update(segmentation=[]), first=change, masks=False)
    for masks in (True, False):
        data, _ = normalised(first=change, masks=masks)
        assert data["annotations"][0]["bbox"] == [10, 10, 30, 30]
        assert data["annotations"][0]["area"] == 900


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ([1, 1, 0, 5], "boxes have no width or height"),
        ([1, 1, 5, -5], "boxes have no width or height"),
        (["1", "1", "0", "5"], "boxes have no width or height"),
        ([80, 10, 5, 5], "boxes lie outside of their picture"),
        ([10, -20, 5, 5], "boxes lie outside of their picture"),
        ([1000, 10, 30, 30], "boxes lie outside of their picture"),
        ([1e308, 1e308, 1e307, 1e307], "boxes lie outside of their picture"),
    ],
)
def test_an_impossible_box_without_a_mask_is_dropped(
    normalised: Callable, box: list, what: str
) -> None:
    def change(annotation: dict) -> None:
        annotation.update(bbox=box, segmentation=[])

    data, findings = normalised(first=change, masks=False)
    assert [a["id"] for a in data["annotations"]] == [2, 3, 4]
    assert what in findings.sentence("dropped")


def test_a_mask_without_meaning_is_no_box(normalised: Callable) -> None:
    meaningless = {"segmentation": [[1, 2, 3, 4, 5]]}
    data, _ = normalised(first=lambda a: a.update(meaningless), masks=False)
    assert data["annotations"][0]["bbox"] == [10, 10, 30, 30]
    with pytest.raises(InputError, match="odd number of coordinates"):
        normalised(first=lambda a: a.update(meaningless, bbox=None), masks=False)


@pytest.mark.parametrize(
    "box",
    [[10, 10, 0, 0], [40, 40, -30, -30], [1000, 10, 30, 30], [10, -90, 30, 30], ["1", 1, "0", 5]],
)
def test_an_impossible_box_beside_a_mask_is_that_of_the_mask(
    normalised: Callable, box: list
) -> None:
    data, findings = normalised(first=lambda a: a.update(bbox=box))
    assert data["annotations"][0]["bbox"] == [10, 10, 30, 30]
    assert "boxes are impossible beside a mask" in findings.table()
