"""tools/recommend.py: what it says, and that it says where it does not know."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import load_config
from gn_det.data.coco import read_coco
from gn_det.data.facts import facts_of
from gn_det.engine.schedule import resolve_schedule
from gn_det.studies.recommendation.measured import Row, rows_text

PROGRAM = "tools/recommend.py"


def row(shapes: Path, **changes: object) -> Row:
    """Measured on the shapes themselves."""
    facts = facts_of(read_coco(shapes / "train.json"))
    recipe = changes.get("recipe", "gn_handed_over")
    values = {
        "data": "shapes", **vars(facts), "recipe": recipe,
        "config": f"configs/compare/photos/{recipe}.yaml", "overrides": "", "weights": "lite0",
        "ims_per_batch": 1, "steps": 1200, "lr": 0.01, "box_ap": 90.0, "box_deviation": 1.5,
        "mask_ap": 80.0, "mask_deviation": 0.5, "seeds": 3, "commit": "abc1234",
    }  # fmt: skip
    return Row(**{**values, **changes})


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_without_a_measured_set_that_is_near_nothing_is_recommended(
    edit_shapes: Callable, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    def one_picture(dataset: dict) -> None:
        ids = {dataset["annotations"][0]["image_id"]}
        dataset["annotations"] = [a for a in dataset["annotations"] if a["image_id"] in ids]

    call_main(PROGRAM, edit_shapes(one_picture))
    told = capsys.readouterr().out
    assert "No recommendation: no measured data set is near yours" in told
    assert "pictures 1, and there 10" in told and "train_net.py" not in told


def test_the_recommendation_names_its_row_and_the_command_has_its_schedule(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    table = tmp_path / "measured.csv"
    worse = row(shapes, recipe="frozenbn", box_ap=89.5)
    table.write_text(rows_text([row(shapes), worse]))
    call_main(PROGRAM, shapes, "--measured", table)
    told = capsys.readouterr().out
    assert "Recommended: gn_handed_over (frozen BN that becomes GN of 1 group), from the " in told
    assert "weights lite0, 1200 steps of 1 image at" in told and told.count("\n>  ") == 1
    assert "90.0 ± 1.5" in told and "abc1234" in told and "one seed" not in told
    assert "Within 1 AP of it: frozenbn at 1 a step." in told
    command = shlex.split(told.strip().splitlines()[-1])
    start = command.index("SOLVER.IMS_PER_GPU")
    cfg = load_config(command[command.index("--config-file") + 1], command[start:])
    # For the reference of 2 images: twice the rate, half the steps, all stretched alike.
    assert (cfg.SOLVER.IMS_PER_GPU, cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (1, 0.02, 600)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.MODEL.GN.HAND_OVER_STEPS) == (200, 400)


def test_batches_that_were_accumulated_are_recommended_so(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    table = tmp_path / "measured.csv"
    keys = "SOLVER.ACCUMULATE_STEPS 4"
    table.write_text(rows_text([row(shapes, overrides=keys, ims_per_batch=4, lr=0.04)]))
    call_main(PROGRAM, shapes, "--measured", table)
    command = shlex.split(capsys.readouterr().out.strip().splitlines()[-1])
    start = command.index("SOLVER.ACCUMULATE_STEPS")
    reference = load_config(command[command.index("--config-file") + 1], command[start:])
    cfg = resolve_schedule(reference, 1)
    images = cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE_STEPS
    assert (images, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (4, 1200, pytest.approx(0.04))


def test_weights_that_have_to_be_made_come_with_their_command(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    table = tmp_path / "measured.csv"
    recipe = ROOT / "configs/compare/photos/gn_distilled.yaml"
    own = tmp_path / "my recipes" / "gn_distilled.yaml"
    own.parent.mkdir()
    own.write_text(f"_BASE_: {recipe}\n")
    table.write_text(
        rows_text([row(shapes, recipe="gn_distilled", config=str(own), weights="lite0_distilled")])
    )
    call_main(PROGRAM, shapes, "--measured", table)
    *_, first, _, second = capsys.readouterr().out.strip().splitlines()
    assert f"convert_bn_to_gn.py --backbone '{own}'" in first
    assert f"--config-file '{own}'" in second
    made = Path(first.split()[-1]) / "distilled.pth"
    assert second.endswith(f"MODEL.TIMM.WEIGHTS {made}")


def test_several_gpus_train_as_many_pictures_in_fewer_steps(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    table = tmp_path / "measured.csv"
    table.write_text(rows_text([row(shapes)]))
    call_main(PROGRAM, shapes, "--measured", table, "--num-gpus", 4)
    told = capsys.readouterr().out
    assert "taken as steps of one GPU. On 4 the same pictures are seen in 1/4 of the steps" in told
    command = shlex.split(told.strip().splitlines()[-1])
    assert command[command.index("--num-gpus") + 1] == "4"
    cfg = load_config(
        command[command.index("--config-file") + 1], command[command.index("OUTPUT_DIR") :]
    )
    scaled = resolve_schedule(cfg, 4)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR) == (4, 0.04)
    assert scaled.SOLVER.MAX_ITER == 1200 // 4
    with pytest.raises(InputError, match="--num-gpus 0: at least 1"):
        call_main(PROGRAM, shapes, "--num-gpus", 0)


def test_the_command_is_that_of_the_row_and_of_the_data(
    shapes: Path, tmp_path: Path, call_main: Callable, capsys: pytest.CaptureFixture
) -> None:
    data = tmp_path / "my boxes"
    data.mkdir()
    (data / "images").symlink_to(shapes / "images")
    content = read_coco(shapes / "train.json")
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    for image in content["images"]:  # mended by the programs that train
        del image["width"], image["height"]
    (data / "train.json").write_text(json.dumps(content))
    table = tmp_path / "measured.csv"
    measured = row(
        shapes, recipe="gn_distilled", weights="lite0_distilled",
        config="configs/compare/photos/gn_everywhere.yaml", overrides="MODEL.GN.NUM_GROUPS 4",
    )  # fmt: skip
    table.write_text(rows_text([measured]))
    call_main(PROGRAM, data, "--measured", table)
    printed = capsys.readouterr().out
    assert "measured with masks. Your data have none" in printed
    *_, first, _, second = printed.strip().splitlines()
    words = shlex.split(second)
    train = words[words.index("--train") + 1 :][:2]
    assert train == [f"{data}/train.json", f"{data}/images"]
    assert "--val" not in words  # which is not there
    assert words[words.index("--config-file") + 1] == measured.config
    cfg = load_config(measured.config, words[words.index("OUTPUT_DIR") :])
    assert (cfg.MODEL.GN.NUM_GROUPS, cfg.MODEL.MASK_ON) == (4, False)
    made = shlex.split(first)
    assert made[-4:] == ["MODEL.GN.NUM_GROUPS", "4", "MODEL.MASK_ON", "False"]
    assert cfg.MODEL.TIMM.WEIGHTS == f"{made[made.index('--output') + 1]}/distilled.pth"


@pytest.mark.parametrize(
    ("memory", "said"),
    [("40GiB", "of 2 images at"), ("400MiB", "of 1 image at"), ("20MiB", "not one image of")],
)
def test_what_does_not_fit_is_not_recommended(
    memory: str,
    said: str,
    shapes: Path,
    tmp_path: Path,
    call_main: Callable,
    capsys: pytest.CaptureFixture,
) -> None:
    table = tmp_path / "measured.csv"
    rows = [row(shapes, recipe="frozenbn", ims_per_batch=n, box_ap=50.0 + n) for n in (1, 2)]
    table.write_text(rows_text(rows))
    call_main(PROGRAM, shapes, "--measured", table, "--gpu-memory", memory)
    told = capsys.readouterr().out
    assert said in told
    assert "fit with GN" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], r"gone.train\.json does not exist"),
        (["{shapes}", "--measured", "setup.py"], "has the columns"),
        (["{shapes}", "--measured", "gone.csv"], r"gone\.csv does not exist"),
    ],
)
def test_bad_input_is_named(
    arguments: list[str], message: str, shapes: Path, call_main: Callable
) -> None:
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, *(argument.format(shapes=shapes) for argument in arguments))
