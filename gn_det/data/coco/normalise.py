"""From what a COCO-format file holds to what training and evaluation read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_det.data.coco.annotations import normalise_annotations
from gn_det.data.coco.categories import Known, normalise_categories
from gn_det.data.coco.findings import Findings
from gn_det.data.coco.images import merge_same_files, normalise_images
from gn_det.data.coco.keypoints import keypoint_names
from gn_det.data.coco.read import read_coco
from gn_det.data.coco.values import whole_number

__all__ = ["declared_categories", "normalise"]


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


def normalise(
    dataset: dict[str, Any],
    image_root: str | Path,
    findings: Findings,
    *,
    masks: bool,
    keypoints: bool = False,
    crowds_as_objects: bool = False,
    known: Known = (),
    file_sizes: Mapping[int, tuple[int, int]] | None = None,
) -> dict[str, Any]:
    """Mend what has one meaning, drop what nothing can be learnt from, refuse what has no meaning.

    Args:
        dataset: what :func:`gn_det.data.coco.read_coco` returned; it is changed.
        image_root: the folder that the file_name of its images is relative to.
        findings: told of everything that was found; ``findings.changed`` says whether the result is
            another than the dataset was.
        masks: whether each annotation needs a mask.
        keypoints: whether each needs the keypoints that its category lists.
        crowds_as_objects: whether iscrowd 1 becomes 0.
        known: (id, name) of the categories that a model or another split has; () for none.
        file_sizes: (width, height) of images by id that are right where the JSON has others.

    Returns:
        The data set in the form that pycocotools and Detectron2 read. A picture that has no size
        in the JSON and cannot be read has None for it.

    Raises:
        InputError: in one line everything that is refused, with counts, ids and values.
    """
    images = normalise_images(dataset["images"], image_root, findings, file_sizes)
    merge_same_files(images, dataset["annotations"], findings)
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
    return {**dataset, "images": images, "categories": categories, "annotations": annotations}
