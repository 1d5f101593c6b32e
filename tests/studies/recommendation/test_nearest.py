"""The table of measurements, and which of its rows says something of a data set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.data.facts import DataFacts, facts_of
from gn_det.studies.recommendation.measured import MEASURED, Row, read_rows, rows_text
from gn_det.studies.recommendation.nearest import best_row, far_in, nearest_rows

ROW = Row(
    data="balloon", pictures=60, classes=1, objects_per_picture=4.0, object_size=0.16,
    recipe="frozenbn", config="configs/compare/photos/frozenbn.yaml", overrides="",
    weights="lite0", ims_per_batch=2, steps=300, lr=0.02,
    box_ap=30.0, box_deviation=1.0, mask_ap=34.0, mask_deviation=2.0, seeds=3,
)  # fmt: skip
FACTS = DataFacts(pictures=60, classes=1, objects_per_picture=4.0, object_size=0.16)


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        ROW,
        replace(ROW, mask_ap=None, mask_deviation=None, commit="abc", note='a, "b"'),
        replace(ROW, box_ap=0.0, lr=0.0025),
    ]
    file = tmp_path / "measured.csv"
    file.write_text(rows_text(rows))
    assert read_rows(file) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", r"has the columns \['a', 'b'\]"),
        ("", "has the columns None"),
        (rows_text([ROW]).replace("0.02", "fast"), "line 2: lr is 'fast', no float"),
        (rows_text([ROW]).replace(",300,", ",,"), "line 2: steps is '', no int"),
        (rows_text([replace(ROW, object_size=0.0)]), "line 2: object_size is '0', no float"),
        (rows_text([replace(ROW, box_ap=math.nan)]), "line 2: box_ap is 'nan', no float"),
        (rows_text([replace(ROW, objects_per_picture=math.inf)]), "is 'inf', no float"),
        (rows_text([replace(ROW, seeds=-1)]), "line 2: seeds is '-1', no int"),
    ],
)
def test_a_table_of_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "measured.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rows(file)


def test_every_shipped_row_is_of_a_recipe_that_there_is_and_says_what_it_is() -> None:
    rows = read_rows(MEASURED)
    assert rows
    for row in rows:
        cfg = load_config(ROOT / f"configs/compare/photos/{row.recipe}.yaml")
        assert cfg.MODEL.TIMM.NAME == "tf_efficientnet_lite0"
        assert row.commit or row.note, f"{row} names neither a commit nor what it is"


@pytest.mark.parametrize(
    ("change", "far"),
    [
        ({}, set()),
        ({"pictures": 120}, set()),
        ({"pictures": 121}, {"pictures"}),
        ({"pictures": 29}, {"pictures"}),
        ({"classes": 4}, set()),
        ({"classes": 5}, {"classes"}),
        (
            {"objects_per_picture": 45.0, "object_size": 0.05},
            {"objects_per_picture", "object_size"},
        ),
    ],
)
def test_a_data_set_is_near_within_factors(change: dict, far: set[str]) -> None:
    found = far_in(replace(FACTS, **change), ROW)
    assert set(found) == far
    for key, (own, measured) in found.items():
        assert (own, measured) == (change[key], getattr(ROW, key))


def test_the_nearest_set_answers() -> None:
    part = replace(ROW, pictures=10)
    longer = replace(ROW, steps=1200, recipe="gn_distilled")
    other = replace(ROW, data="cells", objects_per_picture=45.0)
    rows = [part, ROW, longer, other]
    assert nearest_rows(FACTS, rows) == [ROW, longer]
    assert nearest_rows(replace(FACTS, pictures=12), rows) == [part]
    assert nearest_rows(FACTS, []) == []


@pytest.mark.parametrize(("fitting", "best"), [(0, None), (1, 20.0), (2, 32.0), (4, 11.0)])
def test_the_best_row_is_the_highest_of_the_longest_trainings_that_fit(
    fitting: int, best: float | None
) -> None:
    shorter = replace(ROW, ims_per_batch=1, steps=300, box_ap=20.0, mask_ap=None)
    longer = replace(ROW, ims_per_batch=4, box_ap=11.0, mask_ap=None)
    worse = replace(ROW, box_ap=31.0, mask_ap=31.0)
    row = best_row([worse, ROW, shorter, longer], fitting)
    assert (row.ap if row else None) == best


def test_facts_are_of_objects_with_boxes_in_pictures_with_a_size() -> None:
    images = [{"id": i, "width": 100, "height": 100} for i in range(3)] + [{"id": 3}]
    boxes = [(0, [0, 0, 10, 10]), (0, [0, 0, 20, 20]), (1, [0, 0, 40, 40]), (1, [0, 0, 0, 9]),
             (1, None), (3, [0, 0, 5, 5])]  # fmt: skip
    annotations = [{"image_id": image, "bbox": box} for image, box in boxes]
    annotations.append({"image_id": 2, "bbox": [0, 0, 9, 9], "iscrowd": 1})
    found = facts_of({"images": images, "annotations": annotations, "categories": [{"id": 1}]})
    assert found == DataFacts(2, 1, 1.5, 0.2)


def test_a_set_without_objects_has_no_facts() -> None:
    with pytest.raises(InputError, match="no picture with an object"):
        facts_of({"images": [], "annotations": [], "categories": []})
