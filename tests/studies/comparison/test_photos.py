"""The recipes for photographs, parts of a training set, rates, and prepared GN weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.studies.comparison.matrix import check_comparable
from gn_det.studies.comparison.parts import hold_out_a_quarter, write_part
from gn_det.studies.comparison.rates import best_rates, rates_table, scores_of
from gn_det.studies.comparison.results import RunResult
from gn_det.studies.comparison.tables import groups_table
from gn_det.studies.conversion.backbone import settings_of, source_of

RECIPES = ROOT / "configs" / "compare" / "photos"
COMPARED = sorted(f.stem for f in RECIPES.glob("*.yaml") if f.stem not in ("Base", "scratch_gn"))


def test_the_recipes_for_photographs_differ_in_the_norm_alone() -> None:
    assert len(COMPARED) == 9
    check_comparable({name: load_config(RECIPES / f"{name}.yaml") for name in COMPARED})


def test_from_scratch_is_no_fair_comparison() -> None:
    names = ["gn_converted", "scratch_gn"]
    with pytest.raises(InputError, match=r"MODEL\.TIMM\.WEIGHTS is .* '' in scratch_gn"):
        check_comparable({name: load_config(RECIPES / f"{name}.yaml") for name in names})


@pytest.mark.parametrize(
    ("weights", "source"),
    [
        ("weights/lite0_calibrated.pth", ("weights/lite0.pth", "calibrated")),
        ("lite0_distilled.pth", ("lite0.pth", "distilled")),
        ("weights/lite0.pth", ("weights/lite0.pth", "")),
        ("distilled.pth", ("distilled.pth", "")),
        ("timm", ("timm", "")),
        ("", ("", "")),
    ],
)
def test_the_end_of_a_name_says_how_weights_are_made(weights: str, source: tuple) -> None:
    assert source_of(weights) == source


def dataset(folder: Path, pictures: int, empty: int = 0, crowds: int = 0) -> str:
    """A JSON whose last pictures have no objects, or a crowd alone."""
    total = pictures + empty + crowds
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 10, "height": 10} for i in range(total)]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": i >= pictures}
        for i in [*range(pictures), *range(pictures + empty, total)]
    ]
    file = folder / "all.json"
    categories = [{"id": 1, "name": "thing"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(content))
    return str(file)


def ids(file: Path) -> set[int]:
    content = json.loads(file.read_text())
    images = {image["id"] for image in content["images"]}
    assert {annotation["image_id"] for annotation in content["annotations"]} == images
    assert content["categories"] == [{"id": 1, "name": "thing"}]
    return images


def test_a_smaller_part_lies_in_a_larger_one_and_is_the_same_again(tmp_path: Path) -> None:
    file = dataset(tmp_path, 20, empty=5, crowds=5)
    for number, name in ((4, "small"), (4, "again"), (10, "large")):
        write_part(file, number, tmp_path / f"{name}.json")
    small, again, large = (ids(tmp_path / f"{n}.json") for n in ("small", "again", "large"))
    assert small == again and small < large < set(range(20))
    assert (len(small), len(large)) == (4, 10)


@pytest.mark.parametrize("number", [0, 21])
def test_a_part_of_more_pictures_than_have_objects_is_refused(number: int, tmp_path: Path) -> None:
    file = dataset(tmp_path, 20, empty=5)
    with pytest.raises(InputError, match=rf"part of {number} pictures: .* has 20 with objects"):
        write_part(file, number, tmp_path / "part.json")
    assert not (tmp_path / "part.json").exists()


@pytest.mark.parametrize(("pictures", "held"), [(4, 1), (9, 2), (20, 5)])
def test_rates_are_chosen_on_pictures_that_are_not_trained_on(
    pictures: int, held: int, tmp_path: Path
) -> None:
    train, val = tmp_path / "train.json", tmp_path / "val.json"
    hold_out_a_quarter(dataset(tmp_path, pictures, empty=3), train, val)
    assert len(ids(val)) == held and ids(train) == set(range(pictures)) - ids(val)


def test_too_few_pictures_to_choose_a_rate_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 3 pictures with objects.* it takes 4"):
        hold_out_a_quarter(dataset(tmp_path, 3), tmp_path / "train.json", tmp_path / "val.json")


def reached(recipe: str, box: float, mask: float, failure: str = "") -> RunResult:
    curves = {"bbox/AP": {2: 0.0, 4: box}, "segm/AP": {2: 0.0, 4: mask}}
    return RunResult(recipe, 2, 0, 2, failure, curves)


def test_each_recipe_has_the_rate_of_its_highest_ap() -> None:
    scores = scores_of(
        {
            0.02: [reached("bn", 4, 8), reached("gn", 9, 9, "NaN"), reached("ws", 0, 0, "NaN")],
            0.01: [reached("bn", 6, 6), reached("gn", 1, 3), reached("ws", 0, 0, "NaN")],
        }
    )
    assert scores["bn", 2] == {0.01: 6, 0.02: 6} and scores["gn", 2] == {0.01: 2, 0.02: None}
    # The lower of two that are as good, and where every run failed.
    assert best_rates(scores) == {("bn", 2): 0.01, ("gn", 2): 0.01, ("ws", 2): 0.01}
    lines = rates_table(scores).splitlines()
    assert lines[0].replace(" ", "") == "||imagesperGPU|APat0.01|APat0.02|chosen|"
    assert lines[3].replace(" ", "") == "|gn|2|2.0|failed|0.01|"


def test_a_model_that_finds_nothing_has_an_ap_of_0() -> None:
    nan = float("nan")  # as Detectron2 has it
    scores = scores_of({0.01: [reached("gn", nan, nan)], 0.02: [reached("gn", 20, 30)]})
    assert scores["gn", 2] == {0.01: 0, 0.02: 25} and best_rates(scores) == {("gn", 2): 0.02}


@pytest.fixture
def pictures(tmp_path: Path) -> Iterator[list[dict]]:
    entries = [{"file_name": str(tmp_path / f"{name}.jpg")} for name in "ab"]
    for entry in entries:
        Path(entry["file_name"]).write_bytes(b"picture")
    DatasetCatalog.register("pictures", lambda: entries)
    yield entries
    DatasetCatalog.remove("pictures")


@pytest.mark.parametrize(
    "change",
    [
        ["MODEL.GN.NUM_GROUPS", 4],
        ["MODEL.GN.CHANNELS_PER_GROUP", 1],
        ["MODEL.GN.MIN_CHANNELS_PER_GROUP", 2],
        ["MODEL.GN.WEIGHT_STANDARDIZATION", True],
        ["MODEL.TIMM.NAME", "tf_efficientnet_lite1"],
        ["INPUT.MIN_SIZE_TRAIN", (64,)],
        ["SOLVER.IMS_PER_BATCH", 4],
        ["SEED", 7],
        "steps",
        "weights",
        "pictures",
        "a picture",
    ],
    ids=str,
)
def test_weights_are_made_anew_for_other_settings(
    change: list | str, pictures: list[dict], tmp_path: Path
) -> None:
    weights = tmp_path / "lite0.pth"
    weights.write_bytes(b"one")
    made = str(tmp_path / "lite0_distilled.pth")
    keys = ["DATASETS.TRAIN", ("pictures",), "MODEL.TIMM.WEIGHTS", made]
    file = ROOT / "configs/compare/photos/gn_distilled.yaml"
    before = settings_of(load_config(file, keys), 400)
    if change == "weights":
        weights.write_bytes(b"another")
    if change == "pictures":
        pictures.append(pictures[0])
    if change == "a picture":
        Path(pictures[0]["file_name"]).write_bytes(b"another")
        Path(pictures[1]["file_name"]).write_bytes(b"one more")
    cfg = load_config(file, [*keys, *(change if isinstance(change, list) else [])])
    after = settings_of(cfg, 500 if change == "steps" else 400)
    assert before != after and json.loads(json.dumps(after)) == after


def test_groups_are_columns_and_what_is_not_there_is_empty() -> None:
    groups = {
        "10 pictures": [reached("bn", 2, 4)],
        "all": [reached("bn", 8, 8), reached("gn", 1, 1)],
    }
    lines = [line.replace(" ", "") for line in groups_table(groups).splitlines()]
    assert lines[2:] == ["|bn|2|3.0|8.0|", "|gn|2||1.0|"]
