"""tools/compare.py on parts of a training set, with rates to choose and GN weights to prepare."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.models import lite0_weights
from support.programs import ROOT, folder_flags

from gn_det import InputError
from gn_det.config import load_config
from gn_det.studies.recommendation.measured import read_rows

PROGRAM = "tools/compare.py"
RECIPES = ROOT / "configs" / "compare" / "photos"
SMALL = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", 64, "SOLVER.WARMUP_ITERS", 2]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with stand-in weights where the recipes have theirs."""
    (tmp_path / "weights").mkdir()
    lite0_weights(tmp_path / "weights" / "lite0.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(shapes: Path, *recipes: str) -> list:
    files = [RECIPES / f"{recipe}.yaml" for recipe in recipes]
    return ["--recipes", *files, "--output", "output", *folder_flags(shapes), *SMALL]


def runs_of(folder: Path) -> dict[str, float]:
    return {str(f.parent): f.stat().st_mtime for f in folder.rglob("results.json")}


@pytest.mark.slow
def test_parts_are_compared_each_with_weights_and_rates_of_its_own(
    edit_shapes: Callable, in_folder: Path, call_main: Callable
) -> None:
    def ids_as_text(dataset: dict) -> None:  # which the program mends
        for annotation in dataset["annotations"]:
            annotation["image_id"] = str(annotation["image_id"])

    shapes = edit_shapes(ids_as_text)
    asked = [
        "--parts", 4, "all", "--lrs", 0.01, 0.02, "--steps", 3, "--distill", 1, "--seeds", 5,
        "--ims-per-gpu", 2, *flags(shapes, "gn_distilled"),
    ]  # fmt: skip
    assert call_main(PROGRAM, *asked) == 0
    output = in_folder / "output"
    report = (output / "report.md").read_text()
    assert "| 4 pictures, 6 images seen" in report and "| all pictures, 6 images seen" in report
    rows = read_rows(output / "measured.csv")
    assert [(row.pictures, row.recipe, row.weights, row.steps) for row in rows] == [
        (4, "gn_distilled", "lite0_distilled", 3), (5, "gn_distilled", "lite0_distilled", 3),
    ]  # fmt: skip
    weights = []
    for row, part in zip(rows, ("4pictures-3steps", "allpictures-3steps"), strict=True):
        folder = output / part
        (chosen,) = json.loads((folder / "report.json").read_text())["rates"]
        assert set(chosen["ap"]) == {"0.01", "0.02"} and row.lr in (0.01, 0.02)
        assert "## Learning rates" in (folder / "report.md").read_text()
        tuned = load_config(folder / "rates/runs/gn_distilled-2ims-seed5-lr0.02/config.yaml")
        (final,) = map(load_config, folder.glob("runs/gn_distilled-2ims-seed5-lr*/config.yaml"))
        assert tuned.DATASETS.COCO_FOLDERS != final.DATASETS.COCO_FOLDERS
        assert str(shapes / "val.json") not in str(tuned.DATASETS.COCO_FOLDERS)
        assert tuned.MODEL.TIMM.WEIGHTS == final.MODEL.TIMM.WEIGHTS
        weights.append(torch.load(final.MODEL.TIMM.WEIGHTS)["state_dict"]["bn1.weight"])
    assert not torch.equal(*weights)
    before = runs_of(output)
    assert len(before) == 6
    assert call_main(PROGRAM, *asked) == 0
    assert runs_of(output) == before

    # It grows by what is new, and the rows of what is there stay.
    asked[asked.index("--parts") + 1 : asked.index("--lrs")] = ["all"]
    asked[asked.index("--steps") + 1] = 4
    assert call_main(PROGRAM, *asked) == 0
    grown = runs_of(output)
    assert before.items() <= grown.items() and len(grown) == 9
    assert [(row.pictures, row.steps) for row in read_rows(output / "measured.csv")] == [
        (4, 3), (5, 3), (5, 4),
    ]  # fmt: skip
    assert len([*output.glob("weights/*/distilled.pth")]) == 2


@pytest.mark.slow
def test_numbers_of_steps_stretch_the_schedule_and_the_hand_over(
    shapes: Path, in_folder: Path, call_main: Callable
) -> None:
    asked = ["--steps", 3, 6, "--lrs", 0.005, "--seeds", 0, "--ims-per-gpu", 1]
    assert call_main(PROGRAM, *asked, *flags(shapes, "gn_handed_over")) == 0
    for steps in (3, 6):
        folder = in_folder / "output" / f"{steps}steps"
        cfg = load_config(folder / "runs/gn_handed_over-1ims-seed0/config.yaml")
        # Twice the steps of the reference, at half its rate.
        assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (2 * steps, 0.0025)
        assert cfg.MODEL.GN.HAND_OVER_STEPS == 2 * (2 * steps // 3)
        assert not (folder / "rates").exists()
    assert len(read_rows(in_folder / "output" / "measured.csv")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--parts", 7], "a part of 7 pictures: .* has 5 with objects"),
        (["--parts", "all", 3, "--lrs", 0.01, 0.02], "3 pictures .* it takes 4"),
        (["--steps", 0], "--steps 0: at least 1"),
        (["--parts", "some"], "SystemExit"),
        (["--lrs", 0.01, -1], "--lrs -1.0: a finite number above 0"),
    ],
)
def test_wrong_parts_steps_and_rates_are_refused(
    change: list, message: str, shapes: Path, in_folder: Path, call_main: Callable
) -> None:
    error = SystemExit if message == "SystemExit" else InputError
    with pytest.raises(error, match=None if error is SystemExit else message):
        call_main(PROGRAM, *change, *flags(shapes, "frozenbn"))
    assert not list(in_folder.rglob("runs"))


def test_weights_that_are_not_there_are_named_before_anything_is_trained(
    shapes: Path, in_folder: Path, call_main: Callable
) -> None:
    shutil.rmtree(in_folder / "weights")
    with pytest.raises(InputError, match=r"gn_distilled: .*weights/lite0\.pth does not exist; `ma"):
        call_main(PROGRAM, *flags(shapes, "gn_distilled"))
    assert not (in_folder / "output").exists()


def test_a_key_that_one_recipe_cannot_take_is_told_before_anything_is_trained(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    recipes = [RECIPES / f"{name}.yaml" for name in ("gn_handed_over", "frozenbn")]
    with pytest.raises(InputError, match=r"frozenbn: MODEL.GN.HAND_OVER_STEPS changes nothing"):
        call_main(
            PROGRAM, "--recipes", *recipes, "--output", tmp_path / "out", *folder_flags(shapes),
            "MODEL.TIMM.WEIGHTS", "timm", "MODEL.GN.HAND_OVER_STEPS", 9,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_make_asks_for_a_folder_and_passes_its_variables_on() -> None:
    def make(*variables: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "compare-photos", *variables]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    asked = make()
    assert asked.returncode == 2
    assert "error: name a folder with train.json, val.json and images/" in asked.stderr
    told = make(
        "--dry-run", "DATA=mine/cells of mine/", "PARTS=10 all", "STEPS=300 1200", "LRS=0.5"
    )
    words = shlex.split(told.stdout)
    for flag, values in (
        ("--output", ["output/compare-photos/cells of mine"]),
        ("--parts", ["10", "all"]),
        ("--steps", ["300", "1200"]),
        ("--lrs", ["0.5"]),
        ("--train", ["mine/cells of mine//train.json", "mine/cells of mine//images"]),
        ("--beside", ["configs/compare/photos/scratch_gn.yaml"]),
    ):
        place = words.index(flag, words.index("tools/compare.py")) + 1
        assert words[place : place + len(values)] == values
    recipes = sorted(RECIPES.glob("*.yaml"))
    compared = [f"configs/compare/photos/{f.name}" for f in recipes if f.stem != "Base"]
    assert all(recipe in words for recipe in compared)
