"""The data of a run is checked before it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from support.coco import HEIGHT, WIDTH, dataset
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.engine.command import RunOptions
from gn_det.engine.run_data import RunData, check_data, set_data


def check(folder: Path | None = None, **changes: object) -> RunData:
    flags = {
        "train": None,
        "val": None,
        "skip_bad_images": False,
        "refuse_bad_annotations": False,
        "crowds_as_objects": False,
        "eval_only": False,
    }
    if folder:
        for split in ("train", "val"):
            flags[split] = str(folder / f"{split}.json"), str(folder / "images")
    options = {k: changes.pop(k) for k in list(changes) if k not in flags}
    train, test = options.pop("names", ([], []))
    return check_data(RunOptions(**{**flags, **changes}), train, test, **options)


def test_folders_give_names_and_categories(shapes: Path) -> None:
    data = check(shapes, names=(["coco_2017_train"], ["coco_2017_val"]))
    assert (data.train, data.test) == (["custom_train"], ["custom_val"])
    assert data.categories == [(1, "circle"), (2, "triangle"), (3, "square")]
    assert all(Path(f.json_file).is_absolute() for f in data.folders)
    assert not data.has_rle_masks  # of crowds only


@pytest.mark.parametrize(("given", "told"), [(7, True), (80, False), (3, False)])
def test_a_number_of_classes_that_the_data_overrule_is_told(
    given: int, told: bool, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    cfg = load_config(ROOT / "configs/small/quickstart.yaml")
    cfg.MODEL.RETINANET.NUM_CLASSES = given
    set_data(cfg, check(shapes))
    line = f"MODEL.RETINANET.NUM_CLASSES is {given}, and is now 3, as the data have."
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3
    assert (line in capsys.readouterr().out) == told


def test_without_val_there_is_no_evaluation(shapes: Path) -> None:
    assert check(shapes, val=None, names=([], ["coco_2017_val"])).test == []


def test_val_alone_is_for_evaluation_only(shapes: Path) -> None:
    with pytest.raises(InputError, match="--val goes with --train"):
        check(shapes, train=None)
    assert check(shapes, train=None, eval_only=True).test == ["custom_val"]


def test_folders_of_the_config_are_used_again(shapes: Path) -> None:
    folders = [["mine", str(shapes / "train.json"), str(shapes / "images")]]
    data = check(folders=folders, names=(["mine"], []))
    assert [f.name for f in data.folders] == ["mine"]
    with pytest.raises(InputError, match=r"the model knows \[\(1, 'balloon'\)\]: objects are of"):
        check(folders=folders, names=(["mine"], []), categories=[[1, "balloon"]])


@pytest.mark.parametrize("eval_only", [False, True])
def test_classes_are_those_of_the_training_set_whether_it_trains_or_not(
    shapes: Path, tmp_path: Path, eval_only: bool
) -> None:
    val = json.loads((shapes / "val.json").read_text())
    ids = [category["id"] for category in val["categories"]]
    other = dict(zip(ids, [*ids[1:], ids[0]], strict=True))
    for category in val["categories"]:
        category["id"] = other[category["id"]]
    for annotation in val["annotations"]:
        annotation["category_id"] = other[annotation["category_id"]]
    (tmp_path / "val.json").write_text(json.dumps(val))
    flags = {"val": (str(tmp_path / "val.json"), str(shapes / "images")), "eval_only": eval_only}
    train = {"train": (str(shapes / "train.json"), str(shapes / "images"))}
    assert check(**train, **flags).categories == check(shapes).categories


def test_splits_with_other_categories_are_refused(edit_shapes: Callable) -> None:
    def rename(dataset: dict) -> None:
        dataset["categories"][0]["name"] = "circles"

    folder = edit_shapes(rename, split="val")
    with pytest.raises(InputError, match=r"val\.json declares .*'circles'.* did you mean circle"):
        check(folder)


def test_a_training_split_without_objects_is_refused(edit_shapes: Callable) -> None:
    with pytest.raises(InputError, match=r"train\.json has no annotated object"):
        check(edit_shapes(lambda d: d.update(annotations=[])))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_images_is_refused(edit_shapes: Callable, split: str) -> None:
    folder = edit_shapes(lambda d: d.update(images=[], annotations=[]), split=split)
    with pytest.raises(InputError, match=rf"{split}\.json has no images"):
        check(folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_of_crowds_alone_is_refused_with_the_flag_that_takes_them(
    edit_shapes: Callable, split: str
) -> None:
    folder = edit_shapes(lambda d: [a.update(iscrowd=1) for a in d["annotations"]], split=split)
    message = rf"{split}\.json: all \d+ objects are crowds.*--crowds-as-objects takes them"
    with pytest.raises(InputError, match=message):
        check(folder)
    checked = check(folder, crowds_as_objects=True).checked[f"custom_{split}"]
    assert all(a["iscrowd"] == 0 for a in checked.dataset["annotations"])


def test_a_held_out_split_without_objects_is_refused_before_training(
    edit_shapes: Callable,
) -> None:
    folder = edit_shapes(lambda d: d.update(annotations=[]), split="val")
    with pytest.raises(InputError, match=r"val\.json has no annotated object to evaluate on"):
        check(folder)


def test_what_needs_nothing_is_used_as_it_is_and_the_rest_is_copied(
    edit_shapes: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def from_zero(dataset: dict) -> None:
        for number, annotation in enumerate(dataset["annotations"]):
            annotation.update(id=number, iscrowd=0)

    folder = edit_shapes(from_zero)
    before = (folder / "train.json").read_bytes()
    data = check(folder)
    data.place_copies(tmp_path / "run")
    data.write_copies()
    printed = capsys.readouterr().out
    train, val = (Path(f.json_file) for f in data.folders)
    assert train == tmp_path / "run" / "custom_train.json" and val == folder / "val.json"
    assert [a["id"] for a in json.loads(train.read_text())["annotations"]][:2] == [1, 2]
    assert (folder / "train.json").read_bytes() == before
    table = train.with_suffix(".txt").read_text()
    assert "annotation ids" in table and "annotation ids" in printed and str(train) in printed

    # The copy needs nothing, and what was found on the way to it is not forgotten.
    again = check(
        folders=[["custom_train", str(train), str(folder / "images")]], names=(["custom_train"], [])
    )
    again.place_copies(tmp_path / "run")
    again.write_copies()
    assert again.folders[0].json_file == str(train)
    assert train.with_suffix(".txt").read_text() == table


def test_a_copy_holds_no_infinity(edit_shapes: Callable, tmp_path: Path) -> None:
    folder = edit_shapes(lambda d: d["annotations"][1].update(iscrowd=None, score="infinite"))
    text = (folder / "train.json").read_text()
    (folder / "train.json").write_text(text.replace('"infinite"', "1e999"))
    data = check(folder)
    data.place_copies(tmp_path / "run")
    with pytest.raises(InputError, match=r"train\.json has 1 numbers that .* 2, score: inf"):
        data.write_copies()
    assert not list((tmp_path / "run").glob("custom_train.json*"))


def test_a_second_machine_of_a_run_writes_nothing(edit_shapes: Callable, tmp_path: Path) -> None:
    data = check(edit_shapes(lambda d: [a.update(area=None) for a in d["annotations"]]))
    data.place_copies(tmp_path / "run")
    data.write_copies(write=False)
    assert data.folders[0].json_file == str(tmp_path / "run" / "custom_train.json")
    assert not (tmp_path / "run").exists()


def test_annotations_are_dropped_or_refused_as_asked(edit_shapes: Callable) -> None:
    folder = edit_shapes(lambda d: d["annotations"][0].update(segmentation=[[1, 1, 5, 5]]))
    assert check(folder).checked["custom_train"].findings.count("dropped") == 1
    with pytest.raises(InputError, match="refused: 1 polygons have fewer than three"):
        check(folder, refuse_bad_annotations=True)


def test_turned_pictures_of_both_splits_are_read_alike(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # seen upright, stored lying
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / name, exif=exif)
    (tmp_path / "val.json").write_text(json.dumps(dataset()))  # its objects fit both
    train = dataset()
    upright = [10, 10, 40, 10, 40, 75, 10, 75]
    train["annotations"][0].update(bbox=[10, 10, 30, 65], segmentation=[upright])
    (tmp_path / "train.json").write_text(json.dumps(train))
    data = check(tmp_path)
    widths = {i["width"] for c in data.checked.values() for i in c.dataset["images"]}
    assert len(data.checked) == 2 and widths == {HEIGHT}
    again = check(tmp_path, eval_only=True)
    assert again.checked["custom_val"].dataset["images"][0]["width"] == HEIGHT
    (tmp_path / "train.json").write_text(json.dumps(dataset()))  # now val alone tells
    (tmp_path / "val.json").write_text(json.dumps(train))
    other = check(tmp_path)
    assert {i["width"] for c in other.checked.values() for i in c.dataset["images"]} == {HEIGHT}


def test_missing_and_truncated_images_are_named_and_can_be_left_out(
    edit_shapes: Callable, tmp_path: Path
) -> None:
    folder = edit_shapes(lambda d: None)
    first, second = sorted((folder / "images").iterdir())[:2]
    first.unlink()
    content = second.read_bytes()
    second.unlink()
    second.write_bytes(content[:-100])
    with pytest.raises(InputError) as caught:
        check(folder)
    for part in (
        f"1 of 6 images are missing in {folder / 'images'}: 000001.jpg (",
        "1 of 6 images cannot be used: 000002.jpg (truncated)",
        "; --skip-bad-images leaves them out",
    ):
        assert part in str(caught.value)

    data = check(folder, skip_bad_images=True)
    data.place_copies(tmp_path / "run")
    data.write_copies()
    kept = json.loads(Path(data.folders[0].json_file).read_text())
    assert [image["id"] for image in kept["images"]] == [3, 4, 5, 6]
    assert {a["image_id"] for a in kept["annotations"]} <= {3, 4, 5, 6}
    assert len(json.loads((folder / "train.json").read_text())["images"]) == 6
    assert data.folders[1].json_file == str(folder / "val.json")


@pytest.mark.parametrize("skip_bad_images", [False, True])
def test_where_no_image_is_found_the_run_ends_without_the_advice_to_skip_them(
    edit_shapes: Callable, skip_bad_images: bool
) -> None:
    folder = edit_shapes(lambda d: [i.update(file_name=f"x{i['id']}.jpg") for i in d["images"]])
    with pytest.raises(
        InputError, match="6 of 6 images are missing in .*images: x1.jpg, x2.jpg, x3.jpg and 3 more"
    ) as caught:
        check(folder, skip_bad_images=skip_bad_images)
    assert "--skip-bad-images" not in str(caught.value)


def test_images_under_another_form_of_their_name_are_found(
    edit_shapes: Callable, tmp_path: Path
) -> None:
    def rename(dataset: dict) -> None:
        for image in dataset["images"]:
            image["file_name"] = "images\\" + image["file_name"].upper()

    folder = edit_shapes(rename)
    data = check(folder)
    data.place_copies(tmp_path / "run")
    data.write_copies()
    kept = json.loads(Path(data.folders[0].json_file).read_text())
    assert kept["images"][0]["file_name"] == "000001.jpg"
    table = (tmp_path / "run" / "custom_train.txt").read_text()
    assert "backslashes, a leading folder too many, another case" in table


def test_images_that_would_be_nearly_black_are_warned_of(edit_shapes: Callable) -> None:
    def twelve_bits(dataset: dict) -> None:
        for image in dataset["images"]:
            image["file_name"] = f"{image['id']}.png"

    folder = edit_shapes(twelve_bits)
    for image in json.loads((folder / "train.json").read_text())["images"]:
        values = np.full((image["height"], image["width"]), 4095, np.uint16)
        cv2.imwrite(str(folder / "images" / image["file_name"]), values)
    findings = check(folder).checked["custom_train"].findings
    assert "nearly black: set INPUT.VALUE_RANGE" in findings.table()
    assert "custom_train" not in check(folder, value_range=(0, 4095)).checked


def test_a_size_that_is_not_the_files_is_warned_of_and_mended(edit_shapes: Callable) -> None:
    folder = edit_shapes(lambda d: d["images"][0].update(width=10_000, height=9_000))
    checked = check(folder).checked["custom_train"]
    assert checked.findings.count("warned") == 1 and checked.needs_copy
    assert checked.dataset["images"][0]["width"] < 1_000


def test_rle_masks_of_objects_are_noticed(edit_shapes: Callable) -> None:
    def to_rle(dataset: dict) -> None:
        annotation = next(a for a in dataset["annotations"] if not a["iscrowd"])
        image = next(i for i in dataset["images"] if i["id"] == annotation["image_id"])
        height, width = image["height"], image["width"]
        counts = [10, 100, height * width - 110]
        annotation["segmentation"] = {"size": [height, width], "counts": counts}

    assert check(edit_shapes(to_rle)).has_rle_masks


@pytest.mark.parametrize(("eval_only", "flag"), [(False, "--train"), (True, "--val")])
def test_no_data_set_at_all_is_told(eval_only: bool, flag: str) -> None:
    with pytest.raises(InputError, match=f"no data set is given: add {flag}"):
        check(eval_only=eval_only)


def test_leaving_out_every_image_with_objects_is_refused(edit_shapes: Callable) -> None:
    def only_first_has_objects(dataset: dict) -> None:
        dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] == 1]

    folder = edit_shapes(only_first_has_objects)
    (folder / "images" / "000001.jpg").unlink()
    with pytest.raises(InputError, match="1 of 6 images are missing"):
        check(folder, skip_bad_images=True)


def test_a_set_that_cannot_be_evaluated_is_told_before_training() -> None:
    with pytest.raises(InputError, match="of kind 'cityscapes_instance'; those that are"):
        check(names=([], ["cityscapes_fine_instance_seg_val"]), eval_only=True)


def test_an_unknown_data_set_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="'coco_2017_trian' .* did you mean coco_2017_train"):
        check(names=(["coco_2017_trian"], []))


def test_an_unknown_set_to_evaluate_on_suggests_the_nearest_too() -> None:
    with pytest.raises(InputError, match="'coco_2017_vall' .* did you mean coco_2017_val"):
        check(names=([], ["coco_2017_vall"]), eval_only=True)


def test_a_builtin_data_set_that_is_not_there_says_where_it_is_looked_for() -> None:
    with pytest.raises(InputError, match=r"instances_val2017\.json; .* DETECTRON2_DATASETS"):
        check(names=([], ["coco_2017_val"]), eval_only=True)


def test_a_picture_without_a_size_that_cannot_be_read_is_left_out_with_its_annotations(
    edit_shapes: Callable, tmp_path: Path
) -> None:
    def change(dataset: dict) -> None:
        dataset["images"][0]["width"] = None
        for annotation in dataset["annotations"]:
            annotation.pop("iscrowd")

    folder = edit_shapes(change)
    (folder / "images" / "000001.jpg").unlink()
    (folder / "images" / "000001.jpg").write_text("no picture")
    data = check(folder, skip_bad_images=True)
    data.place_copies(tmp_path)
    data.write_copies()
    kept = json.loads((tmp_path / "custom_train.json").read_text())
    assert [image["id"] for image in kept["images"]] == [2, 3, 4, 5, 6]
    assert {a["iscrowd"] for a in kept["annotations"]} == {0}
