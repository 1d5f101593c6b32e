"""The evaluator for a data set, by its kind."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

from gn_det.errors import InputError

__all__ = ["build_evaluator"]


def build_evaluator(cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
    """Detectron2's evaluator for a registered data set.

    COCO's AP counts the best TEST.DETECTIONS_PER_IMAGE detections of an image: COCO's own 100 by
    default, more where crowded pictures need it.

    Raises:
        InputError: a kind of data set that Detectron2 has no evaluator for.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)

    def coco() -> COCOEvaluator:
        limit = cfg.TEST.DETECTIONS_PER_IMAGE
        return COCOEvaluator(dataset_name, output_dir=folder, max_dets_per_image=limit)

    def sem_seg() -> SemSegEvaluator:
        return SemSegEvaluator(dataset_name, distributed=True, output_dir=folder)

    kinds = {
        "coco": coco,
        "sem_seg": sem_seg,
        "coco_panoptic_seg": lambda: DatasetEvaluators(
            [sem_seg(), coco(), COCOPanopticEvaluator(dataset_name, folder)]
        ),
        "lvis": lambda: LVISEvaluator(dataset_name, output_dir=folder),
        "pascal_voc": lambda: PascalVOCDetectionEvaluator(dataset_name),
    }
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in kinds:
        raise InputError(f"data set {dataset_name!r} is of kind {kind!r}; known: {sorted(kinds)}")
    return kinds[kind]()
