"""Masks in every form that tools write them become COCO's, with the very same pixels."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
import pytest
from support.coco import HEIGHT, SQUARE, WIDTH

from gn_det.data.coco.findings import DroppedError, RefusedError
from gn_det.data.coco.segmentation import normalise_segmentation

SIZE = HEIGHT, WIDTH
RLE = mask_util.merge(mask_util.frPyObjects([SQUARE], *SIZE))
COMPRESSED = {"size": list(SIZE), "counts": RLE["counts"].decode()}
RUNS = [610, *[30, 30] * 29, 30, 2420]
PAIRS = [list(point) for point in zip(SQUARE[::2], SQUARE[1::2], strict=True)]


def pixels(segmentation: Any) -> np.ndarray:
    if isinstance(segmentation, list):
        segmentation = mask_util.merge(mask_util.frPyObjects(segmentation, *SIZE))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask_util.frPyObjects(segmentation, *SIZE)
    return mask_util.decode(segmentation)


@pytest.mark.parametrize("value", [[SQUARE], COMPRESSED, {"size": [60, 80], "counts": RUNS}])
def test_cocos_own_forms_stay(value: Any) -> None:
    mask = normalise_segmentation(value, SIZE)
    assert mask.segmentation == value and not mask.mended
    assert (pixels(mask.segmentation) == mask_util.decode(RLE)).all()
    assert mask.area == 900 and mask.extent == (10, 10, 40, 40)


@pytest.mark.parametrize(
    "value",
    [
        SQUARE,
        PAIRS,
        [PAIRS],
        [[str(v) for v in SQUARE]],
        json.dumps([SQUARE]),
        [[*SQUARE, *SQUARE[:2]]],
        [[*SQUARE[:2], *SQUARE]],
        [SQUARE[:4] + SQUARE[2:]],
        {"size": [60.0, 80.0], "counts": RUNS},
        {"size": ["60", "80"], "counts": RUNS},
        {"size": [60, 80], "counts": [str(run) for run in RUNS]},
        {"size": [60, 80], "counts": [float(run) for run in RUNS]},
        {"size": [60, 80], "counts": " ".join(map(str, RUNS))},
        {"size": [60, 80], "counts": json.dumps(RUNS)},
        {"size": [60, 80], "counts": str(RLE["counts"])},
        {"counts": COMPRESSED["counts"]},
        {"counts": RUNS},
        [COMPRESSED],
        json.dumps(COMPRESSED),
        COMPRESSED["counts"],
    ],
)
def test_other_forms_become_cocos(value: Any) -> None:
    mask = normalise_segmentation(value, SIZE)
    assert mask.mended
    assert (pixels(mask.segmentation) == mask_util.decode(RLE)).all()
    again = normalise_segmentation(mask.segmentation, SIZE)
    assert again.segmentation == mask.segmentation and not again.mended


@pytest.mark.parametrize("value", [None, [], [[]], [[], []], [None], {}, "", " "])
def test_nothing_is_no_mask(value: Any) -> None:
    assert normalise_segmentation(value, SIZE) is None


@pytest.mark.parametrize(
    ("scrap", "is_scrap"),
    [
        ([1, 2], True),
        ([1, 2, 3, 4], True),
        ([1, 1, 5, 5, 9, 9], True),
        ([70, 50, 70.2, 50, 70.2, 50.2], True),
        ([50, 50, 60, 50, 60, 55], False),
    ],
)
def test_scraps_beside_a_good_polygon_go(scrap: list[float], is_scrap: bool) -> None:
    mask = normalise_segmentation([SQUARE, scrap], SIZE)
    assert mask.scraps == ([scrap] if is_scrap else [])
    assert mask.segmentation == [SQUARE] + ([] if is_scrap else [scrap])


def test_a_polygon_that_crosses_itself_is_judged_by_its_pixels() -> None:
    bow_tie = [10, 10, 40, 40, 40, 10, 10, 40]  # whose signed areas cancel out
    assert normalise_segmentation([bow_tie], SIZE).area > 400


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2, 3, 4, 5, 6, 7]], "odd number"),
        ([[1, 2, 3, 4, 5, "x"]], "no finite number"),
        ([[1, 2, 3, 4, 5, float("nan")]], "no finite number"),
        ([[1, 2, 3, 4, 5, "inf"]], "no finite number"),
        ([[1, 2, 3, 4, 5, None]], "no finite number"),
        ([[[1, 2, 3], [4, 5, 6]]], "polygons are lists in too many lists: write .*x1, y1"),
        ([[SQUARE]], "polygons are lists in too many lists"),
        ([[PAIRS]], "polygons are lists in too many lists"),
        ({"all_points_x": [1, 9, 9], "all_points_y": [1, 1, 9]}, "^segm.*: write polygons as"),
        ([{"all_points_x": [1, 9, 9], "all_points_y": [1, 1, 9]}], "^segm.*: write polygons as"),
        ([COMPRESSED, COMPRESSED], "^segmentations are lists of objects: merge them into one RLE"),
        ([SQUARE, COMPRESSED], "^segmentations are lists of objects"),
        ("10,10,40,10,40,40", "^segmentations are text with no run lengths .*: write polygons as"),
        ("10 10 40 10 40 40", "^segmentations are text with no run lengths"),
        ([1, 2, [3, 4]], "mix lists and numbers"),
        ([[10, 10, 1e9, 10, 40, 40]], "far outside of their picture"),
        ([[10, 10, -1e6, 10, 40, 40]], "far outside of their picture"),
        (True, "neither polygons nor RLE"),
        ({"size": [80, 60], "counts": RUNS}, r"another size than their picture.*\[height 60, w"),
        ({"size": [60], "counts": RUNS}, "another size"),
        ({"size": [60, 80], "counts": [1000, 200]}, "do not sum to height × width.*1200, not 60"),
        ({"size": [60, 80], "counts": [1000, 200, 4800]}, "do not sum"),
        ({"size": [60, 80], "counts": [4900, -100]}, "no run lengths"),
        ({"size": [60, 80], "counts": [4799.5, 0.5]}, "no run lengths"),
        ({"size": [60, 80], "counts": [10**30]}, "do not sum|no run lengths"),
        ({"size": [60, 80]}, "no run lengths"),
        ({"size": [60, 80], "counts": "ä"}, "no run lengths"),
        ({"size": [60, 80], "counts": COMPRESSED["counts"][:-3]}, "do not sum|no run lengths"),
        ({"size": [60, 80], "counts": COMPRESSED["counts"] + "o"}, "no run lengths"),
        ({"size": [60, 80], "counts": "oooooooooooooooo0"}, "no run lengths"),
        ("mask.png", "no run lengths|do not sum"),
    ],
)
def test_masks_without_meaning_are_refused(value: Any, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        normalise_segmentation(value, SIZE)
    assert re.search(message, " ".join(caught.value.args))


def test_any_mask_passes_compressed_and_as_runs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width = rng.integers(1, 40, 2)
        pixels = rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])
        rle = mask_util.encode(np.asfortranarray(pixels.astype(np.uint8)))
        value = {"size": [int(height), int(width)], "counts": rle["counts"].decode()}
        if pixels.any():
            assert normalise_segmentation(value, (height, width)).area == pixels.sum()
        else:
            with pytest.raises(DroppedError, match="without a pixel"):
                normalise_segmentation(value, (height, width))
