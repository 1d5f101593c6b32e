"""The annotations of a COCO-format data set: what they refer to, their boxes, masks and flags."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tqdm import tqdm

from gn_det.data.coco.boxes import BoxSuspicions, normalise_box
from gn_det.data.coco.coordinates import Fractions, coordinates
from gn_det.data.coco.findings import DroppedError, Findings, RefusedError, shown
from gn_det.data.coco.keypoints import normalise_keypoints, visible_points
from gn_det.data.coco.segmentation import SCRAPS, Mask, normalise_segmentation
from gn_det.data.coco.values import finite_numbers, flag, whole_number

__all__ = ["normalise_annotations"]

_LARGEST_AREA = 9  # pictures, which is that of a box that reaches as far out as boxes may
_LARGEST_ID = 2**53  # COCO's evaluation keeps the ids of annotations in float64


def normalise_annotations(
    annotations: list[dict[str, Any]],
    sizes: dict[int, tuple[int, int] | None],
    stands_for: dict[int, int],
    findings: Findings,
    *,
    masks: bool,
    keypoints: int | None = None,
    crowds_as_objects: bool = False,
) -> list[dict[str, Any]]:
    """Bring annotations into the form that training and evaluation read, in place.

    Args:
        annotations: those of the JSON.
        sizes: (height, width) of the pictures by id; None where a picture cannot be read.
        stands_for: the category that a category_id stands for.
        findings: told of everything that is mended, dropped, suspicious or refused.
        masks: whether each needs a mask.
        keypoints: how many keypoints each needs; None where the model learns none.
        crowds_as_objects: whether iscrowd 1 becomes 0.

    Returns:
        The annotations that are kept. Those of pictures that cannot be read are as they were.
    """
    kept, without_mask = [], []
    suspicions, fractions = BoxSuspicions(), Fractions()
    for index, annotation in enumerate(
        tqdm(annotations, desc="checking annotations", unit="annotation", delay=2)
    ):
        place = _place(annotation, index)
        try:
            size = _references(annotation, sizes, stands_for, place, findings)
            if size is None:
                kept.append(annotation)
                continue
            _mend_crowd(annotation, crowds_as_objects, place, findings)
            fractions.look_at(_learnt(annotation, masks, keypoints), size, place)
            mask = _mend_mask(annotation, size, masks, place, findings)
            _mend_box(annotation, mask, size, place, findings)
            suspicions.look_at(annotation["bbox"], mask.extent if mask else None, size, place)
            _mend_area(annotation, mask, size, place, findings)
            normalise_keypoints(annotation, keypoints, size, place, findings)
        except RefusedError as refused:
            what, value = refused.args
            findings.add("refused", what, place, text=value)
        except DroppedError as dropped:
            what, value = dropped.args
            findings.add("dropped", what, place, text=value)
        else:
            (kept if mask or not masks else without_mask).append(annotation)
    _drop_without_mask(without_mask, len(kept), findings)
    kept = _once(kept, findings)
    suspicions.report(findings)
    fractions.report(findings, len(annotations))
    _number(kept, findings)
    return kept


def _place(annotation: dict[str, Any], index: int) -> str:
    number = annotation.get("id")
    if type(number) is int:
        return f"annotation {number}"
    return f"annotation {shown(number)}" if "id" in annotation else f"annotations[{index}]"


def _references(
    annotation: dict[str, Any],
    sizes: dict[int, tuple[int, int] | None],
    stands_for: dict[int, int],
    place: str,
    findings: Findings,
) -> tuple[int, int] | None:
    """Settle what an annotation refers to, and return the size of its picture."""
    for key, known, what in (
        ("image_id", sizes, "annotations belong to an image that is not there"),
        ("category_id", stands_for, "annotations have a category_id that no category has"),
    ):
        written = annotation.get(key)
        number = whole_number(written)
        if number not in known:
            raise RefusedError(what, f"{key} {shown(written)}")
        if type(written) is not int:
            findings.add("mended", f"{key} written as text or 1.0", place, written)
        annotation[key] = number
    annotation["category_id"] = stands_for[annotation["category_id"]]
    return sizes[annotation["image_id"]]


def _learnt(annotation: dict[str, Any], masks: bool, keypoints: int | None) -> dict[str, Any]:
    """The coordinates that a model learns or takes a box from, by what they are of."""
    written = {"boxes": annotation.get("bbox")}
    if masks or not any(coordinates(annotation.get("bbox"))):
        written["polygons"] = annotation.get("segmentation")
    if keypoints:
        written["keypoints"] = visible_points(coordinates(annotation.get("keypoints")))
    return written


def _mend_crowd(
    annotation: dict[str, Any], crowds_as_objects: bool, place: str, findings: Findings
) -> None:
    written = annotation.get("iscrowd")
    crowd = flag(written)
    if crowd is None:
        raise RefusedError("iscrowd is neither 0 nor 1", shown(written))
    if type(written) is not int:
        what = "iscrowd is missing, or not the number 0 or 1"
        findings.add("mended", what, place, written)
    if annotation.get("ignore", 0) != 0:
        ignored = flag(annotation["ignore"])
        if ignored is None:
            raise RefusedError("ignore is neither 0 nor 1", shown(annotation["ignore"]))
        what = "what is ignored is a crowd" if ignored else "nothing is ignored"
        findings.add("mended", f"ignore is written: {what}", place)
        del annotation["ignore"]
        crowd = crowd or ignored
    if crowd and crowds_as_objects:
        findings.add("mended", "crowds are taken as objects", place)
        crowd = 0
    annotation["iscrowd"] = crowd


def _mend_mask(
    annotation: dict[str, Any],
    size: tuple[int, int],
    masks: bool,
    place: str,
    findings: Findings,
) -> Mask | None:
    written = annotation.get("segmentation")
    try:
        mask = normalise_segmentation(written, size)
    except (DroppedError, RefusedError) as error:
        if masks or (isinstance(error, RefusedError) and not annotation.get("bbox")):
            raise
        mask = None
    if mask is None:
        if written:
            annotation["segmentation"] = []
            if not masks:
                what = "masks that hold nothing or have no meaning, of objects with a box"
                findings.add("mended", what, place, written)
        return None
    for what in dict.fromkeys(mask.mended):
        findings.add("mended", what, place, written)
    for scrap in mask.scraps:
        findings.add("dropped", SCRAPS, place, scrap)
    annotation["segmentation"] = mask.segmentation
    return mask


def _mend_box(
    annotation: dict[str, Any],
    mask: Mask | None,
    size: tuple[int, int],
    place: str,
    findings: Findings,
) -> None:
    written = annotation.get("bbox")
    box, what = normalise_box(written, mask.extent if mask else None, size)
    if what:
        findings.add("mended", what, place, written)
    annotation["bbox"] = box


def _mend_area(
    annotation: dict[str, Any],
    mask: Mask | None,
    size: tuple[int, int],
    place: str,
    findings: Findings,
) -> None:
    written = annotation.get("area")
    numbers = finite_numbers([written])
    if numbers and 0 < numbers[0] <= _LARGEST_AREA * size[0] * size[1]:
        if numbers[0] is not written:
            findings.add("mended", "areas written as text", place, written)
        annotation["area"] = numbers[0]
        return
    box = annotation["bbox"]
    annotation["area"] = mask.area if mask else box[2] * box[3]
    what = "areas are missing, not above 0 or far too large: those of the masks, else of the boxes"
    findings.add("mended", what, place, written)


def _drop_without_mask(annotations: list[dict[str, Any]], others: int, findings: Findings) -> None:
    """Drop the objects without a mask, unless they are most of a data set."""
    few = len(annotations) <= others
    what = "annotations have no segmentation (for boxes alone, set MODEL.MASK_ON False)"
    for annotation in annotations:
        place = f"annotation {shown(annotation.get('id'))}"
        findings.add("dropped" if few else "refused", what, place)


def _once(annotations: list[dict[str, Any]], findings: Findings) -> list[dict[str, Any]]:
    """The annotations without repetitions, as of files that were joined twice."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    kept = []
    for annotation in annotations:
        box = annotation.get("bbox")
        key = annotation["image_id"], annotation["category_id"], repr(box)
        others = alike.setdefault(key, [])
        if any(_same_object(annotation, other) for other in others):
            what = "objects are listed twice: once is taken"
            findings.add("mended", what, f"annotation {shown(annotation.get('id'))}")
        else:
            others.append(annotation)
            kept.append(annotation)
    return kept


def _same_object(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("segmentation", "keypoints", "iscrowd"))


def _number(annotations: list[dict[str, Any]], findings: Findings) -> None:
    """Number annotations from 1, unless each has a number of its own that evaluations can use.

    To COCO's evaluation, the id 0 is no match at all.
    """
    for annotation in annotations:
        number = whole_number(annotation.get("id"))
        if number is not None and type(annotation["id"]) is not int:
            what = "annotation ids written as text or 1.0"
            findings.add("mended", what, f"annotation {shown(annotation['id'])}")
            annotation["id"] = number
    times = Counter(repr(annotation.get("id")) for annotation in annotations)
    bad = [
        annotation
        for annotation in annotations
        if type(number := annotation.get("id")) is not int
        or not 0 < number < _LARGEST_ID
        or times[repr(number)] > 1
    ]
    if not bad:
        return
    what = "annotation ids are missing, 0, repeated or no whole numbers: all are numbered anew"
    place = f"annotation {shown(bad[0]['id'])}" if "id" in bad[0] else "annotations without an id"
    findings.add("mended", what, place, count=len(bad))
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
