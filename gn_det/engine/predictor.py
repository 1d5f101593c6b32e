"""From a config and weights to predictions on images."""

from __future__ import annotations

import logging

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from gn_det.checkpoint import Checkpointer
from gn_det.data.resize import ResizeShortestEdge

__all__ = ["Predictor", "model_categories"]


class Predictor(DefaultPredictor):
    """Detectron2's DefaultPredictor, for which weights that do not fit are an error.

    Calling it with an (H, W, 3) uint8 BGR image returns the model's output for that image.

    Args:
        cfg: the whole config; MODEL.WEIGHTS is loaded.

    Raises:
        InputError: the weights do not exist or do not fit the model.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        Checkpointer(self.model).load(cfg.MODEL.WEIGHTS)
        size = cfg.INPUT.MIN_SIZE_TEST
        self.aug = ResizeShortestEdge([size, size], cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT


def model_categories(cfg: CfgNode) -> list[tuple[int, str]]:
    """(category id of the data set, name) by class index, for what a config predicts.

    From DATASETS.CATEGORIES, else from a data set of DATASETS.TEST that Detectron2 knows, if it has
    as many as the model; else ids from 1, with the id as the name.
    """
    if cfg.DATASETS.CATEGORIES:
        return [(number, name) for number, name in cfg.DATASETS.CATEGORIES]
    dense = "RetinaNet" in cfg.MODEL.META_ARCHITECTURE
    number = cfg.MODEL.RETINANET.NUM_CLASSES if dense else cfg.MODEL.ROI_HEADS.NUM_CLASSES
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    names = metadata.get("thing_classes")
    index_of = metadata.get("thing_dataset_id_to_contiguous_id")
    if names is not None and len(names) != number:
        logging.getLogger(__name__).warning(
            f"the model has {number} classes, and {cfg.DATASETS.TEST[0]} of DATASETS.TEST "
            f"{len(names)}: numbers stand for names, which DATASETS.CATEGORIES can give"
        )
        names = index_of = None
    if names is None:
        names = [str(i + 1) for i in range(number)]
    if index_of is None:
        index_of = {i + 1: i for i in range(len(names))}
    return sorted(
        ((i, names[index]) for i, index in index_of.items()), key=lambda c: index_of[c[0]]
    )
