"""The evaluator for a data set, by its kind."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

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

__all__ = ["ap_of", "build_evaluator", "check_evaluator", "check_expected"]

_KINDS = ("coco", "coco_panoptic_seg", "lvis", "pascal_voc", "sem_seg")


def build_evaluator(cfg: CfgNode, dataset_name: str, name: str = "inference") -> DatasetEvaluator:
    """Detectron2's evaluator for a registered data set.

    COCO's AP counts the best TEST.DETECTIONS_PER_IMAGE detections of an image: COCO's own 100 by
    default, more where crowded images need it.

    Args:
        cfg: of the model.
        dataset_name: of the set.
        name: of the folder for predictions, in OUTPUT_DIR.

    Raises:
        InputError: a kind of data set that Detectron2 has no evaluator for.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, name)
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)

    limit = cfg.TEST.DETECTIONS_PER_IMAGE
    if limit < 0:  # Detectron2's "all", which COCO's evaluation does not know
        limit = 100_000

    def coco() -> COCOEvaluator:
        return COCOEvaluator(
            dataset_name,
            output_dir=folder,
            max_dets_per_image=limit,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )

    def sem_seg() -> SemSegEvaluator:
        return SemSegEvaluator(dataset_name, distributed=True, output_dir=folder)

    kind = check_evaluator(dataset_name)
    if kind == "coco":
        return coco()
    if kind == "sem_seg":
        return sem_seg()
    if kind == "coco_panoptic_seg":
        panoptic = COCOPanopticEvaluator(dataset_name, folder)
        return DatasetEvaluators([sem_seg(), coco(), panoptic])
    if kind == "lvis":
        return LVISEvaluator(dataset_name, output_dir=folder)
    return PascalVOCDetectionEvaluator(dataset_name)


def check_evaluator(dataset_name: str) -> str:
    """The kind of a registered data set; InputError for one that is not evaluated here."""
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    if kind not in _KINDS:
        raise InputError(
            f"data set {dataset_name!r} is of kind {kind!r}; those that are evaluated are {_KINDS}"
        )
    return kind


def ap_of(value: float) -> float:
    """An AP of Detectron2's, which has NaN where nothing was detected: an AP of 0."""
    return 0.0 if math.isnan(value) else value


def check_expected(cfg: CfgNode, results: Mapping[str, Any]) -> None:
    """Hold results to TEST.EXPECTED_RESULTS.

    Args:
        cfg: with rows of [task, metric, value, tolerance].
        results: metrics by task.

    Raises:
        InputError: naming each metric that was not evaluated, or is another than expected.
    """
    wrong = []
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        found = results.get(task, {}).get(metric)
        if not isinstance(found, (int, float)):
            there = ", ".join(f"{name}/{m}" for name, metrics in results.items() for m in metrics)
            wrong.append(f"{task}/{metric} was not evaluated, but {there}")
        elif not abs(found - expected) <= tolerance:  # NaN, too
            wrong.append(f"{task}/{metric} is {found:.2f}, not {expected:g} ± {tolerance:g}")
    if wrong:
        raise InputError(f"TEST.EXPECTED_RESULTS: {'; '.join(wrong)}; results.json has them all")
