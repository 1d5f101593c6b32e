"""Annotations as tools write them: mended, dropped or refused, by kind."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.coco import SQUARE, dataset

from gn_det import InputError

Normalised = Callable[..., tuple[dict, Any]]


def setting(**values: object) -> Callable[[dict], None]:
    return lambda annotation: annotation.update(values)


def without(key: str) -> Callable[[dict], object]:
    return lambda annotation: annotation.pop(key)


def test_a_sound_set_is_left_as_it_is(normalised: Normalised) -> None:
    data, findings = normalised()
    assert data == dataset()
    assert not findings.changed and findings.table() == ""


@pytest.mark.parametrize("value", [None, False, 0.0, "0", "0.0", "false", "", "absent"])
def test_no_crowd_is_written_in_many_ways(normalised: Normalised, value: object) -> None:
    change = without("iscrowd") if value == "absent" else setting(iscrowd=value)
    data, findings = normalised(each=change)
    assert data == dataset()
    assert findings.count("mended") == 4 and "iscrowd" in findings.table()


@pytest.mark.parametrize("value", [True, 1.0, "1", "true"])
def test_a_crowd_is_written_in_many_ways(normalised: Normalised, value: object) -> None:
    data, findings = normalised(first=setting(iscrowd=value))
    assert [a["iscrowd"] for a in data["annotations"]] == [1, 0, 0, 0]
    assert findings.count("mended") == 1


@pytest.mark.parametrize("value", [2, -1, 0.5, "maybe", [0], {}])
def test_other_values_of_iscrowd_are_refused(normalised: Normalised, value: object) -> None:
    with pytest.raises(InputError, match=r"1 iscrowd is neither 0 nor 1 \(annotation 1: "):
        normalised(first=setting(iscrowd=value))


@pytest.mark.parametrize(("value", "crowd"), [(1, 1), (True, 1), ("1", 1), (None, 0), ("0", 0)])
def test_what_is_ignored_is_a_crowd(normalised: Normalised, value: object, crowd: int) -> None:
    data, _ = normalised(first=setting(ignore=value))
    assert "ignore" not in data["annotations"][0] and data["annotations"][0]["iscrowd"] == crowd


def test_crowds_are_taken_as_objects_when_asked(normalised: Normalised) -> None:
    data, findings = normalised(each=setting(iscrowd=1), crowds_as_objects=True)
    assert data == dataset() and "crowds are taken as objects" in findings.table()


@pytest.mark.parametrize("value", [None, "", "large", 0, -3, 1e200, [900], "absent"])
@pytest.mark.parametrize("masks", [True, False])
def test_an_area_is_that_of_the_mask_or_the_box(
    normalised: Normalised, value: object, masks: bool
) -> None:
    def change(annotation: dict) -> None:
        annotation["area"] = value
        if value == "absent":
            del annotation["area"]
        annotation["bbox"] = [11, 11, 29, 30]
        if not masks:
            del annotation["segmentation"]

    data, findings = normalised(first=change, masks=masks)
    assert data["annotations"][0]["area"] == (900 if masks else 870)
    assert findings.count("mended") == 1


def test_an_area_in_text_is_that_number(normalised: Normalised) -> None:
    data, findings = normalised(first=setting(area="12.5"))
    assert data["annotations"][0]["area"] == 12.5 and findings.count("mended") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda d: [a.update(id=a["id"] - 1) for a in d["annotations"]],
        lambda d: [a.pop("id") for a in d["annotations"]],
        lambda d: d["annotations"][2].pop("id"),
        lambda d: [a.update(id=a["image_id"]) for a in d["annotations"]],
        lambda d: [a.update(id=f"a{a['id']}") for a in d["annotations"]],
        lambda d: d["annotations"][1].update(id=1.5),
        lambda d: d["annotations"][1].update(id=-1),
        lambda d: d["annotations"][1].update(id=None),
        lambda d: d["annotations"][1].update(id=True),
        lambda d: d["annotations"][1].update(id=2**60 + 1),
        lambda d: [a.update(id=str(a["id"])) for a in d["annotations"]],
        lambda d: [a.update(id=float(a["id"])) for a in d["annotations"]],
        lambda d: d["annotations"][1].update(id="1"),
    ],
)
def test_annotations_get_numbers_that_the_evaluation_can_use(
    normalised: Normalised, change: Callable[[dict], object]
) -> None:
    data, findings = normalised(change)
    assert data == dataset() and findings.count("mended") > 0


def test_ids_of_ones_own_are_kept(normalised: Normalised) -> None:
    data, findings = normalised(lambda d: [a.update(id=a["id"] * 1000) for a in d["annotations"]])
    assert [a["id"] for a in data["annotations"]] == [1000, 2000, 3000, 4000]
    assert not findings.changed


def test_the_evaluation_indeed_takes_the_id_0_for_no_match() -> None:
    def ap(first_id: int) -> float:
        truth, data = COCO(), dataset()
        data["annotations"] = [{**data["annotations"][0], "id": first_id}]
        with contextlib.redirect_stdout(io.StringIO()):
            truth.dataset = data
            truth.createIndex()
            found = {"image_id": 2, "category_id": 1, "bbox": [10, 10, 30, 30], "score": 0.9}
            evaluation = COCOeval(truth, truth.loadRes([found]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return evaluation.stats[0]

    assert ap(1) == pytest.approx(1) and ap(0) == 0


@pytest.mark.parametrize("key", ["image_id", "category_id"])
@pytest.mark.parametrize("kind", [str, float])
def test_references_in_text_or_with_a_point_are_numbers(
    normalised: Normalised, key: str, kind: type
) -> None:
    data, findings = normalised(each=lambda a: a.update({key: kind(a[key])}))
    assert data == dataset() and findings.count("mended") == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(image_id=9), "1 annotations belong to an image that is not there .annotation 1"),
        (setting(image_id=None), "image that is not there"),
        (setting(image_id="1.jpg"), "image that is not there .annotation 1: image_id '1.jpg'"),
        (setting(category_id=9), "1 annotations have a category_id that no category has"),
        (setting(category_id="box"), "that no category has .annotation 1: category_id 'box'"),
        (without("category_id"), "that no category has .annotation 1: category_id None"),
        (setting(category_id=1.5), "category_id 1.5"),
        (
            setting(bbox=[1, 2, 3]),
            r"1 boxes are not four finite numbers .annotation 1: \[1, 2, 3\]",
        ),
        (setting(bbox=[1, 2, 3, "x"]), "not four finite numbers"),
        (setting(bbox=[1, 2, 3, "nan"]), "not four finite numbers"),
        (setting(bbox=[1, 2, 3, 1e999]), "not four finite numbers"),
        (setting(bbox=[1, 2, 3, 10**400]), "not four finite numbers"),
        (setting(bbox=[1, 2, 3, True]), "not four finite numbers"),
        (setting(bbox={"x": 1}), "not four finite numbers"),
        (setting(bbox=7), "not four finite numbers"),
    ],
)
def test_what_has_no_meaning_is_refused_with_its_id_and_value(
    normalised: Normalised, change: Callable[[dict], object], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        normalised(first=change)
    assert str(caught.value).startswith("x.json is refused: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keypoints",
    [[1, 2], [[10, 10, 2]], "left", [1, None, 2], [10, 10, 5], [10, 10, -1], [1e300, 10, 2]],
)
def test_keypoints_that_nothing_learns_are_left_out_where_they_have_no_meaning(
    normalised: Normalised, keypoints: object
) -> None:
    data, findings = normalised(first=setting(keypoints=keypoints))
    assert "keypoints" not in data["annotations"][0] and findings.count("mended") == 1


def test_objects_that_are_listed_twice_are_taken_once(normalised: Normalised) -> None:
    def join_twice(data: dict) -> None:
        objects = data["annotations"]
        other = {**objects[1], "id": 30, "bbox": [10, 10, 30, 31]}
        objects += [{**a, "id": a["id"] + 10} for a in objects]
        objects.append(other)

    data, findings = normalised(join_twice)
    assert [a["id"] for a in data["annotations"]] == [1, 2, 3, 4, 30]
    assert findings.count("mended") == 4 and "listed twice: once is taken" in findings.table()


def test_every_kind_of_problem_is_told_at_once_with_counts(normalised: Normalised) -> None:
    with pytest.raises(
        InputError, match=r"1 annotations have a category_id .*; 3 boxes are not four .*; also 3, 4"
    ):
        normalised(each=setting(bbox=[1]), first=setting(category_id=99))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (setting(segmentation=[[10, 20, 40, 50]]), "polygons have fewer than three points"),
        (setting(segmentation=[[10, 20, 40, 50, 10, 20]]), "polygons have fewer than three points"),
        (setting(segmentation=[[10, 20]]), "polygons have fewer than three points"),
        (setting(segmentation=[[10, 10, 20, 20, 30, 30]]), "polygons have no area"),
        (setting(segmentation=[[10, 10, 10.1, 10, 10.1, 10.1]]), "masks are without a pixel"),
        (setting(segmentation={"size": [60, 80], "counts": [4800]}), "masks are without a pixel"),
        (setting(segmentation=[]), "annotations have no segmentation"),
        (setting(segmentation=[[]]), "annotations have no segmentation"),
        (setting(segmentation=None), "annotations have no segmentation"),
        (setting(segmentation=""), "annotations have no segmentation"),
        (without("segmentation"), "annotations have no segmentation"),
    ],
)
def test_what_nothing_can_be_learnt_from_is_dropped_and_not_the_whole_set(
    normalised: Normalised, change: Callable[[dict], object], what: str
) -> None:
    data, findings = normalised(first=change)
    assert [a["id"] for a in data["annotations"]] == [2, 3, 4]
    assert findings.count("dropped") == 1
    assert what in findings.table() and "annotation 1" in findings.table()
    with pytest.raises(InputError, match=f"x.json is refused: 1 {what}"):
        normalised(first=change, strict=True)


def test_most_objects_have_to_have_a_mask_where_masks_are_learnt(normalised: Normalised) -> None:
    with pytest.raises(InputError, match=r"4 annotations have no segm.*MODEL.MASK_ON False"):
        normalised(each=setting(segmentation=[]))
    data, findings = normalised(each=setting(segmentation=[]), masks=False)
    assert len(data["annotations"]) == 4 and not findings.changed


@pytest.mark.parametrize(
    "segmentation",
    [[[]], [None], " ", [[1, 2]], [[1, 2, 3, 4]], {"size": [60, 80], "counts": [4800]}],
)
def test_a_model_of_boxes_keeps_objects_whose_mask_is_empty(
    normalised: Normalised, segmentation: object
) -> None:
    data, findings = normalised(first=setting(segmentation=segmentation), masks=False)
    assert data["annotations"][0]["segmentation"] == [] and findings.count("mended") == 1


@pytest.mark.parametrize("box", [None, [], "", [0, 0, 0, 0], [None] * 4, "absent"])
@pytest.mark.parametrize(
    "segmentation", [[SQUARE], {"size": [60, 80], "counts": [610, *[30, 30] * 29, 30, 2420]}]
)
def test_a_missing_box_is_that_of_the_mask(
    normalised: Normalised, box: object, segmentation: object
) -> None:
    def change(annotation: dict) -> None:
        annotation.update(bbox=box, segmentation=segmentation)
        if box == "absent":
            del annotation["bbox"]

    data, findings = normalised(first=change)
    assert data["annotations"][0]["bbox"] == [10, 10, 30, 30]
    assert findings.count("mended") == 1


@pytest.mark.parametrize("box", [["10", "10", "30", "30.0"], "[10, 10, 30, 30]"])
def test_a_box_in_text_is_its_numbers(normalised: Normalised, box: object) -> None:
    data, findings = normalised(each=setting(bbox=box))
    assert data == dataset() and findings.count("mended") == 4
