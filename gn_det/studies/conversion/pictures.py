"""Pictures that a conversion looks at, without their labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader

from gn_det.data.mapper import PictureMapper
from gn_det.data.train_loader import build_train_loader

__all__ = ["TrainingPictures", "held_out_pictures"]


class TrainingPictures:
    """Batches of training pictures of a config, the same ones whenever one begins to read."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        with closing(build_train_loader(self.cfg)) as loader:
            yield from loader


def held_out_pictures(cfg: CfgNode) -> list[list[dict[str, Any]]]:
    """Batches of up to 8 held-out pictures; 4 batches of training pictures where there are none."""
    if not cfg.DATASETS.TEST:
        return [*islice(TrainingPictures(cfg), 4)]
    mapper = PictureMapper(cfg, is_train=False)
    pictures = build_detection_test_loader(cfg, cfg.DATASETS.TEST[0], mapper=mapper)
    return [*islice(pictures, 8)]
