"""The programs that redraw the Group Normalization paper's figures, in a form of seconds."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.programs import ROOT, TINY, folder_flags
from torch.utils.data import Subset

from gn_det import InputError
from gn_det.classification import datasets

DIGITS = ["--data", "digits", "--network", "resnet10", "--epochs", 1, "--device", "cpu"]


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.open()))


@pytest.fixture
def programs(call_main: Callable, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Calls a program, and returns what it printed."""

    def call(name: str, *args: object) -> str:
        assert not call_main(f"tools/{name}.py", *args)
        return capsys.readouterr().out

    return call


@pytest.mark.slow
def test_error_against_batch_size_and_the_gap_of_its_classifiers(
    programs: Callable, tmp_path: Path
) -> None:
    sweep = [
        *DIGITS, "--output", tmp_path, "--norms", "BN", "GN",
        "--ims-per-gpu", 64, 32, "--seeds", 0, "--jobs", 2,
    ]  # fmt: skip
    printed = programs("batch_size_sweep", *sweep)
    assert '"seed": 0' in printed and "| images per step" in printed
    assert "BN: too few runs finished to say." in printed
    errors = rows(tmp_path / "errors.csv")
    assert len(errors) == 4 and all(0 <= float(row["val_error"]) <= 100 for row in errors)
    for picture in ("error_by_batch.png", "error_curves.png"):
        assert (tmp_path / picture).exists()
    finished = {f: f.stat().st_mtime_ns for f in tmp_path.glob("runs/*/model_final.pth")}
    assert len(finished) == 4
    assert programs("batch_size_sweep", *sweep) == printed
    assert all(file.stat().st_mtime_ns == time for file, time in finished.items())
    with pytest.raises(InputError, match="BN-64ims-seed0 holds .*: lr is 0.1 in the run, 0.2"):
        programs("batch_size_sweep", *sweep, "--lr", 0.2)

    gap = tmp_path / "gap"
    runs = [tmp_path / "runs" / f"{norm}-32ims-seed0" for norm in ("BN", "GN")]
    printed = programs("train_test_gap", *runs, "--output", gap, "--batch-sizes", 2, 64)
    assert "trained on digits with seed 0" in printed
    cells = {(r["model"], r["shift"], r["batch_size"]): r["error"] for r in rows(gap / "gap.csv")}
    own = json.loads((runs[0] / "results.json").read_text())["val_error"]
    assert float(cells["resnet10 with BN", "none", ""]) == pytest.approx(own)
    assert cells["resnet10 with GN", "none", ""] == cells["resnet10 with GN", "none", "2"]
    assert (gap / "gap.png").exists()
    with pytest.raises(InputError, match="two of the classifiers are a resnet10 with BN"):
        programs("train_test_gap", runs[0], runs[0], "--output", tmp_path / "other")
    with pytest.raises(InputError, match="exists and is no empty folder"):
        programs("train_test_gap", *runs, "--output", gap)


@pytest.mark.slow
def test_error_by_groups(programs: Callable, tmp_path: Path) -> None:
    printed = programs(
        "group_ablation", *DIGITS, "--output", tmp_path, "--seeds", 0, "--ims-per-gpu", 128,
        "--num-groups", 32, 1, "--channels-per-group", 1, "--jobs", 2,
    )  # fmt: skip
    for norm in ("LN at 1 group", "IN at 1 channel per group"):
        (line,) = [line for line in printed.splitlines() if norm in line]
        assert float(line.split()[-1]) < 1e-5
    errors = rows(tmp_path / "errors.csv")
    assert [(r["num_groups"], r["channels_per_group"]) for r in errors] == [
        ("32", ""),
        ("1", ""),
        ("", "1"),
    ]
    assert "| groups" in printed and "| channels per group" in printed
    assert (tmp_path / "group_errors.png").exists()


@pytest.mark.slow
def test_a_run_that_diverges_is_told_and_the_others_stand(
    call_main: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status = call_main(
        "tools/batch_size_sweep.py", *DIGITS, "--output", tmp_path, "--norms", "none", "GN",
        "--ims-per-gpu", 128, "--seeds", 0, "--lr", 1e6,
    )  # fmt: skip
    printed = capsys.readouterr()
    assert status == 1 and "0 of 1 finished" in printed.out
    assert "none-128ims-seed0 failed: iteration" in printed.out
    assert "Traceback" not in printed.out + printed.err
    assert "the loss is not finite" in rows(tmp_path / "errors.csv")[0]["failure"]


@pytest.mark.slow
def test_features_of_vgg16(programs: Callable, tmp_path: Path) -> None:
    flags = [
        "--output", tmp_path, "--data", small_folder(tmp_path), "--jobs", 2,
        "--size", 32, "--epochs", 2, "--ims-per-gpu", 4, "--lr", 0.01, "--records", 4,
    ]  # fmt: skip
    printed = programs("feature_distribution", *flags)
    assert "features.png" in printed
    runs = [row["run"] for row in rows(tmp_path / "features.csv")]
    assert runs == [norm for norm in ("none", "BN", "GN") for _ in range(4)]
    assert (tmp_path / "features.png").exists()
    # Finished runs have nothing of another module.
    with pytest.raises(InputError, match=r"features-backbone\.linear-4\.json has no features"):
        programs("feature_distribution", *flags, "--module", "backbone.linear")
    with pytest.raises(InputError, match="overrides go with --recipes"):
        programs("feature_distribution", *flags, "SOLVER.BASE_LR", 1)


def small_folder(parent: Path) -> Path:
    """Four pictures of each of two digits, as a folder of classes."""
    folder = parent / "digits"
    for split, dataset in zip(("train", "val"), datasets.load_images("digits", 32), strict=True):
        for label in (0, 1):
            (folder / split / str(label)).mkdir(parents=True)
            of_label = [i for i in range(60) if dataset[i]["label"] == label][:4]
            for sample in Subset(dataset, of_label):
                image = sample["image"].byte().permute(1, 2, 0).numpy()
                name = f"{sample['file_name']}.png"
                Image.fromarray(image).save(folder / split / str(label) / name)
    return folder


def test_features_of_any_module_of_a_detector(
    programs: Callable, edit_shapes: Callable, tmp_path: Path
) -> None:
    shapes = edit_shapes(lambda dataset: None)
    recipes = [ROOT / f"configs/compare/{name}.yaml" for name in ("scratch_gn", "frozenbn")]
    scratch = ["MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.BASE_LR", 1e-4]
    flags = [
        "feature_distribution", "--output", tmp_path / "out", "--recipes", *recipes,
        "--module", "roi_heads.mask_head.mask_fcn1", *folder_flags(shapes), *scratch, *TINY,
    ]  # fmt: skip
    programs(*flags)
    with pytest.raises(InputError, match="holds a run with other settings: SOLVER.BASE_LR"):
        programs(*flags, "SOLVER.BASE_LR", 2e-4)
    assert {row["run"] for row in rows(tmp_path / "out/features.csv")} == {"scratch_gn", "frozenbn"}
    edit_shapes(lambda dataset: dataset["annotations"].pop())
    with pytest.raises(InputError, match="custom_train is another than the run began with"):
        programs(*flags)


def test_a_sweep_goes_on_with_the_images_that_it_began_with(
    programs: Callable, tmp_path: Path
) -> None:
    folder = small_folder(tmp_path)
    flags = [
        "batch_size_sweep", "--data", folder, "--size", 32, "--network", "resnet10", "--epochs", 1,
        "--device", "cpu", "--norms", "GN", "--seeds", 0, "--output", tmp_path / "out",
    ]  # fmt: skip
    with pytest.raises(InputError, match="GN-16ims-seed0: 8 images do not make a step of 16"):
        programs(*flags, "--ims-per-gpu", 4, 16)
    assert not (tmp_path / "out").exists()
    assert "an epoch leaves out" not in programs(*flags, "--ims-per-gpu", 4)
    assert "Of 8 images, an epoch leaves out 2 at 3 per step." in programs(
        *flags, "--ims-per-gpu", 3
    )
    next((folder / "train" / "0").iterdir()).unlink()
    with pytest.raises(InputError, match="training_images is 8 in the run, 7"):
        programs(*flags, "--ims-per-gpu", 4)


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("train", {"bbox": [1, 1, 5, 5]}),
        ("train", {"category_id": 2}),
        ("val", {"bbox": [1, 1, 5, 5]}),
    ],
)
def test_a_sweep_goes_on_with_the_objects_that_it_began_with(
    programs: Callable, edit_shapes: Callable, tmp_path: Path, split: str, change: dict[str, Any]
) -> None:
    flags = [
        "batch_size_sweep", "--data", edit_shapes(lambda dataset: None), "--size", 16,
        "--network", "resnet10", "--epochs", 1, "--device", "cpu", "--norms", "GN",
        "--ims-per-gpu", 4, "--seeds", 0, "--output", tmp_path / "out",
    ]  # fmt: skip
    programs(*flags)
    programs(*flags)
    edit_shapes(lambda dataset: dataset["annotations"][0].update(change), split)
    recipe_file = next(tmp_path.glob("out/runs/*/recipe.json"))
    digest = {"train": "training_digest", "val": "held_out_digest"}[split]
    with pytest.raises(InputError, match=f"holds a run with other settings: {digest} is "):
        programs(*flags)
    recipe = json.loads(recipe_file.read_text())
    del recipe["training_digest"], recipe["held_out_digest"]  # as older runs are
    recipe_file.write_text(json.dumps(recipe))
    programs(*flags)


def test_groups_without_gn_are_an_error(programs: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_groups 8 .* are of GN, and the norm is BN"):
        programs(
            "batch_size_sweep", *DIGITS, "--output", tmp_path, "--norms", "BN", "--num-groups", 8
        )


def test_what_is_to_be_learnt_has_to_be_said(programs: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="say what to learn: --data"):
        programs("feature_distribution", "--output", tmp_path)


def test_the_diagram_is_measured_on_the_layers(programs: Callable, tmp_path: Path) -> None:
    printed = programs("norm_diagram", "--output", tmp_path / "norms.png")
    assert printed.splitlines() == [
        "Batch Norm: 20 of 120 values together",
        "Layer Norm: 30 of 120 values together",
        "Instance Norm: 5 of 120 values together",
        "Group Norm: 15 of 120 values together",
    ]
    assert (tmp_path / "norms.png").exists()
    with pytest.raises(InputError, match=r"norms\.png exists; remove it"):
        programs("norm_diagram", "--output", tmp_path / "norms.png")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_ends_leaves_no_process_and_goes_on(
    how: signal.Signals, tmp_path: Path
) -> None:
    command = [
        sys.executable, ROOT / "tools/batch_size_sweep.py", *DIGITS, "--output", tmp_path,
        "--norms", "GN", "--ims-per-gpu", 2, "--seeds", 0, "--jobs", 2,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*map(str, command)]
    run = tmp_path / "runs" / "GN-2ims-seed0"
    with subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        # Those who run the tests in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as sweep:
        wait_for(lambda: (run / "metrics.json").exists() and (run / "metrics.json").stat().st_size)
        if how == signal.SIGINT:  # Ctrl-C reaches the whole group
            os.killpg(sweep.pid, how)
        else:
            sweep.send_signal(how)
    wait_for(lambda: (run / "last_checkpoint").exists())
    wait_for(lambda: not processes_of_session(sweep.pid))
    if how == signal.SIGINT:
        assert sweep.returncode == 130
        return
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert results["val_error"] < 50
    assert torch.load(run / "model_final.pth", weights_only=True)["iteration"] == 717


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def processes_of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found
