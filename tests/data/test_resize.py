"""Pictures that are long and thin are resized as well."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import transforms as T

from gn_det.data.resize import for_thin_pictures


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((3, 3000), (1, 100)),
        ((2500, 2), (100, 1)),
        ((1, 1), (50, 50)),
        ((40, 60), (50, 75)),
        ((40, 90), (44, 100)),
    ],
)
def test_no_side_becomes_empty(size: tuple[int, int], resized: tuple[int, int]) -> None:
    flip = T.RandomFlip()
    resize, other = for_thin_pictures([T.ResizeShortestEdge(50, 100), flip])
    image = np.zeros((*size, 3), np.uint8)
    transform = resize.get_transform(image)
    assert transform.apply_image(image).shape == (*resized, 3) and other is flip


@pytest.mark.parametrize("style", ["choice", "range"])
def test_the_same_sizes_are_drawn_as_by_detectron2(style: str) -> None:
    theirs = T.ResizeShortestEdge((30, 60), 100, style)
    (ours,) = for_thin_pictures([theirs])
    image = np.zeros((40, 50, 3), np.uint8)

    def drawn(resize: T.Augmentation) -> list[tuple[int, int]]:
        np.random.seed(0)
        transforms = [resize.get_transform(image) for _ in range(20)]
        return [(t.new_h, t.new_w) for t in transforms]

    assert drawn(ours) == drawn(theirs)
