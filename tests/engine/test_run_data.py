"""The data of a run is checked before it starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gn_det import InputError
from gn_det.engine.command import RunOptions
from gn_det.engine.run_data import RunData, check_data


def check(folder: Path | None = None, **changes: object) -> RunData:
    flags = {"train": None, "val": None, "skip_bad_images": False, "eval_only": False}
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
    with pytest.raises(InputError, match=r"the model knows \[\(1, 'balloon'\)\]"):
        check(folders=folders, names=(["mine"], []), categories=[[1, "balloon"]])


def test_splits_with_other_categories_are_refused(edit_shapes: Callable) -> None:
    folder = edit_shapes(lambda d: d["categories"].append({"id": 9, "name": "star"}), split="val")
    with pytest.raises(InputError, match=r"val\.json declares .*star"):
        check(folder)


def test_a_training_split_without_objects_is_refused(edit_shapes: Callable) -> None:
    with pytest.raises(InputError, match=r"train\.json has no annotated object"):
        check(edit_shapes(lambda d: d.update(annotations=[])))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_images_is_refused(edit_shapes: Callable, split: str) -> None:
    folder = edit_shapes(lambda d: d.update(images=[], annotations=[]), split=split)
    with pytest.raises(InputError, match=rf"{split}\.json has no images"):
        check(folder)


def test_missing_and_truncated_images_are_named_and_can_be_left_out(
    edit_shapes: Callable, tmp_path: Path
) -> None:
    folder = edit_shapes(lambda d: None)
    first, second = sorted((folder / "images").iterdir())[:2]
    first.unlink()
    content = second.read_bytes()
    second.unlink()
    second.write_bytes(content[:-100])
    with pytest.raises(InputError, match="2 of 6 images: 000001.jpg .missing., 000002.jpg .trunc"):
        check(folder)

    data = check(folder, skip_bad_images=True)
    data.leave_out_bad_images(tmp_path / "run")
    kept = json.loads(Path(data.folders[0].json_file).read_text())
    assert [image["id"] for image in kept["images"]] == [3, 4, 5, 6]
    assert {a["image_id"] for a in kept["annotations"]} <= {3, 4, 5, 6}
    assert len(json.loads((folder / "train.json").read_text())["images"]) == 6
    assert data.folders[1].json_file == str(folder / "val.json")


def test_a_set_of_bad_images_only_is_refused_all_the_same(edit_shapes: Callable) -> None:
    folder = edit_shapes(lambda d: [i.update(file_name="x.jpg") for i in d["images"]])
    with pytest.raises(InputError, match="6 of 6 images: x.jpg .missing., .* and 1 more"):
        check(folder, skip_bad_images=True)


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
    with pytest.raises(InputError, match="1 of 6 images"):
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
