"""The matrix of a comparison: what may differ, whose folder is whose, and getting runs done."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from support.programs import ROOT

from gn_det import InputError
from gn_det.config import dump_config, load_config
from gn_det.config.differences import differences
from gn_det.engine.folders import locked
from gn_det.studies.comparison.matrix import (
    Run,
    check_comparable,
    check_folders,
    run_all,
)

RECIPES = ROOT / "configs" / "compare"


def recipe(name: str, *overrides: str) -> CfgNode:
    return load_config(RECIPES / f"{name}.yaml", overrides)


def run(folder: Path, name: str = "gn", seed: int = 0, **solver: int) -> Run:
    cfg = recipe(name)
    cfg.SEED = seed
    for key, value in solver.items():
        cfg.SOLVER[key] = value
    made = Run(name, 2, seed, cfg)
    cfg.OUTPUT_DIR = str(folder / made.name)
    return made


def test_the_shipped_recipes_differ_in_the_norm_alone() -> None:
    names = ["frozenbn", "bn", "frozenbn_gn_heads", "gn"]
    check_comparable({name: recipe(name) for name in names})


def test_the_control_and_gn_of_the_coco_recipes_are_comparable() -> None:
    names = ["frozenbn", "frozenbn_gn_heads", "gn"]
    files = {name: ROOT / f"configs/coco/mask_rcnn_R_50_FPN_{name}_1x.yaml" for name in names}
    check_comparable({name: load_config(file) for name, file in files.items()})


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["SOLVER.BASE_LR", "0.5"], r"SOLVER\.BASE_LR is 0\.04 in frozenbn, 0\.5 in gn"),
        (["MODEL.ROI_BOX_HEAD.NUM_CONV", "4"], r"MODEL\.ROI_BOX_HEAD\.NUM_CONV is 2 in .*, 4 in"),
        (["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"], r"MODEL\.ROI_HEADS\.NAME is"),
        (["MODEL.WEIGHTS", ""], r"MODEL\.WEIGHTS is '.*' in frozenbn, '' in gn"),
        (["MODEL.BACKBONE.FREEZE_AT", "0"], r"MODEL\.BACKBONE\.FREEZE_AT is 2 in frozenbn, 0 in"),
        (["SOLVER.WEIGHT_DECAY_NORM", "0.1"], r"SOLVER\.WEIGHT_DECAY_NORM"),
    ],
)
def test_recipes_that_differ_in_more_are_refused_and_it_is_said_in_what(
    overrides: list[str], told: str
) -> None:
    with pytest.raises(InputError, match=rf"differ in more than the norm: .*{told}"):
        check_comparable({"frozenbn": recipe("frozenbn"), "gn": recipe("gn", *overrides)})


def test_differences_are_by_key_and_recipe() -> None:
    found = differences({"a": recipe("gn"), "b": recipe("gn", "SEED", "5", "OUTPUT_DIR", "other")})
    assert found == {"SEED": {"a": 0, "b": 5}}


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has gn-2ims-seed0 twice"):
        check_folders([run(tmp_path), run(tmp_path)])


def test_a_run_with_other_settings_is_kept_and_named(tmp_path: Path) -> None:
    there = run(tmp_path)
    there.folder.mkdir()
    (there.folder / "config.yaml").write_text(dump_config(there.cfg))
    check_folders([there, run(tmp_path, seed=1)])
    message = r"holds a run with other settings: SOLVER\.MAX_ITER is \d+ in the run, 7"
    with pytest.raises(InputError, match=message):
        check_folders([run(tmp_path, MAX_ITER=7)])


def test_a_folder_of_something_else_is_not_taken(tmp_path: Path) -> None:
    asked = run(tmp_path)
    asked.folder.mkdir()
    (asked.folder / "photo.jpg").touch()
    with pytest.raises(InputError, match="holds something that is no run of this program"):
        check_folders([asked])


def test_two_comparisons_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InputError, match="another program is at work in"):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


# Stands in for tools/train_net.py: notes that it was started, and does as its seed says.
PROGRAM = """
import json, pathlib, signal, sys, time, yaml
config = pathlib.Path(sys.argv[sys.argv.index("--config-file") + 1])
folder, cfg = config.parent, yaml.safe_load(config.read_text())
with open(folder / "started", "a") as file:
    file.write("x")
if cfg["SEED"] == 1:
    sys.exit("error: the loss is not finite at iteration 3")
if cfg["SEED"] == 2:
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "saved").touch(), sys.exit(143)))
    (folder / "ready").touch()
    time.sleep(60)
(folder / "metrics.json").write_text(json.dumps({"iteration": cfg["SOLVER"]["MAX_ITER"] - 1}))
(folder / "results.json").write_text("{}")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def test_all_runs_are_done_and_finished_ones_not_again(tmp_path: Path, program: Path) -> None:
    runs = [run(tmp_path / "runs", name) for name in ("gn", "bn", "frozenbn")]
    assert run_all(runs, program, jobs=2, num_gpus=1) == {}
    assert run_all(runs, program, jobs=2, num_gpus=1) == {}
    assert [(r.folder / "started").read_text() for r in runs] == ["x"] * 3
    assert all(r.finished and r.iterations_done == r.cfg.SOLVER.MAX_ITER for r in runs)


def test_a_run_that_fails_is_told_and_the_others_go_on(tmp_path: Path, program: Path) -> None:
    runs = [run(tmp_path / "runs", seed=seed) for seed in (1, 0)]
    failures = run_all(runs, program, jobs=1, num_gpus=1)
    assert failures == {"gn-2ims-seed1": "error: the loss is not finite at iteration 3"}
    assert runs[1].finished


def test_ending_a_comparison_ends_its_runs_in_peace(tmp_path: Path, program: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "sys.path[:0] = ['tests/studies/comparison', 'tests']\n"
        "from test_matrix import run, run_all\n"
        f"run_all([run(Path({str(tmp_path)!r}), seed=2)], Path({str(program)!r}), 1, 1)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    ready = tmp_path / "gn-2ims-seed2" / "ready"
    deadline = time.monotonic() + 60
    while not ready.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.terminate()
    assert process.wait() == 128 + signal.SIGTERM
    assert ready.with_name("saved").exists()
