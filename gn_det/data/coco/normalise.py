"""From the objects that a COCO-format file holds to what training and evaluation read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gn_det.data.coco.annotations import normalise_annotations
from gn_det.data.coco.categories import Known, normalise_categories
from gn_det.data.coco.findings import Findings
from gn_det.data.coco.keypoints import keypoint_names
from gn_det.data.coco.read import read_coco
from gn_det.data.coco.values import whole_number

__all__ = ["declared_categories", "normalise_objects"]


def declared_categories(json_file: str | Path) -> list[tuple[int, str]]:
    """(id, name) of the categories that a run has which trains on a file, by class index.

    Raises:
        InputError: no such file, or its categories are refused.
    """
    dataset = read_coco(json_file)
    findings = Findings(json_file)
    categories, _ = normalise_categories(dataset["categories"], _used(dataset), (), findings)
    return sorted((category["id"], category["name"]) for category in categories)


def _used(dataset: dict[str, Any]) -> set[int | None]:
    return {whole_number(annotation.get("category_id")) for annotation in dataset["annotations"]}


def normalise_objects(
    dataset: dict[str, Any],
    findings: Findings,
    *,
    masks: bool,
    keypoints: bool = False,
    crowds_as_objects: bool = False,
    known: Known = (),
) -> dict[str, Any]:
    """Mend what has one meaning, drop what nothing can be learnt from, refuse what has no meaning.

    Args:
        dataset: what :func:`gn_det.data.coco.read_coco` returned, with its pictures normalised; it
            is changed.
        findings: told of everything that was found; ``findings.changed`` says whether the result is
            another than the dataset was.
        masks: whether each annotation needs a mask.
        keypoints: whether each needs the keypoints that its category lists.
        crowds_as_objects: whether iscrowd 1 becomes 0.
        known: (id, name) of the categories that a model or another split has; () for none.

    Returns:
        The data set in the form that pycocotools and Detectron2 read.

    Raises:
        InputError: in one line everything that is refused, with counts, ids and values.
    """
    images = dataset["images"]
    used = _used(dataset)
    categories, stands_for = normalise_categories(dataset["categories"], used, known, findings)
    names = keypoint_names(categories)
    if keypoints and not names:
        what = "categories list no keypoints, or not all the same ones"
        findings.add("refused", what, "categories", [c.get("keypoints") for c in categories])
    findings.check()
    annotations = normalise_annotations(
        dataset["annotations"],
        {i["id"]: None if i["width"] is None else (i["height"], i["width"]) for i in images},
        stands_for,
        findings,
        masks=masks,
        keypoints=len(names) if keypoints else None,
        crowds_as_objects=crowds_as_objects,
    )
    findings.check()
    return {**dataset, "categories": categories, "annotations": annotations}
