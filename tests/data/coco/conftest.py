"""Fixtures: a data set of two pictures, normalised after a change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.coco import HEIGHT, WIDTH, dataset

from gn_det.data.coco import Findings, normalise_images, normalise_objects


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """The folder of the two pictures."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in (1, 2):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def normalised(images: Path) -> Callable[..., tuple[dict, Findings]]:
    """Normalise a data set after a change to it, to each annotation or to the first one."""

    def run(
        change: Callable[[dict], object] = lambda d: None,
        *,
        each: Callable[[dict], object] = lambda a: None,
        first: Callable[[dict], object] = lambda a: None,
        strict: bool = False,
        masks: bool = True,
        **options: object,
    ) -> tuple[dict, Findings]:
        data = dataset()
        for annotation in data["annotations"]:
            each(annotation)
        first(data["annotations"][0])
        change(data)
        findings = Findings("x.json", strict=strict)
        normalise_images(data, images, findings)
        return normalise_objects(data, findings, masks=masks, **options), findings

    return run
