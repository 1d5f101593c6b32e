"""tools/compare.py end to end: a matrix of two recipes in a form of seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support.programs import ROOT, folder_flags, run_program

from gn_det import InputError

PROGRAM = "tools/compare.py"
RECIPES = ROOT / "configs" / "compare"
# From scratch, so that no classifier is needed first.
SETTINGS = [
    "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", 0, "SOLVER.MAX_ITER", 2,
    "SOLVER.WARMUP_ITERS", 1, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.EVAL_PERIOD", 1,
]  # fmt: skip


def flags(shapes: Path, output: Path, *recipes: str, seeds: tuple[int, ...] = (0, 1)) -> list:
    files = [RECIPES / f"{recipe}.yaml" for recipe in recipes or ("bn", "gn")]
    return [
        "--recipes", *files, "--ims-per-gpu", 1, 2, "--seeds", *seeds, "--jobs", 2,
        "--output", output, *folder_flags(shapes), *SETTINGS,
    ]  # fmt: skip


def without_val(words: list) -> list:
    place = words.index("--val")
    return [*words[:place], *words[place + 3 :]]


def steps_of(output: Path) -> dict[str, int]:
    """Lines of metrics.json by run, which grow when a run trains again."""
    return {
        run.name: len((run / "metrics.json").read_text().splitlines())
        for run in (output / "runs").iterdir()
    }


@pytest.fixture(scope="module")
def compared(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    output = tmp_path_factory.mktemp("comparison") / "output"
    done = run_program(PROGRAM, *flags(shapes, output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_every_run_of_the_matrix_is_there_and_in_the_report(compared: Path) -> None:
    names = {f"{r}-{n}ims-seed{s}" for r in ("bn", "gn") for n in (1, 2) for s in (0, 1)}
    assert {run.name for run in (compared / "runs").iterdir()} == names
    report = json.loads((compared / "report.json").read_text())
    assert {f"{r['recipe']}-{r['ims_per_gpu']}ims-seed{r['seed']}" for r in report["runs"]} == names
    assert len((compared / "runs.csv").read_text().splitlines()) == 9
    # One image at a time sees as many in twice the steps.
    places = {r["ims_per_gpu"]: list(r["curves"]["segm/AP"]) for r in report["runs"]}
    assert places == {1: ["2", "4"], 2: ["2", "4"]}


@pytest.mark.slow
def test_the_report_says_what_was_equal_and_what_was_not(compared: Path) -> None:
    report = (compared / "report.md").read_text()
    assert "`MODEL.RESNETS.NORM`: 'BN' in bn, 'FrozenBN' in gn" in report
    assert "`MODEL.META_ARCHITECTURE`" in report and "SOLVER" not in report
    assert "2 iterations of 2 images" in report and "over\n2 seeds (0, 1)" in report
    for picture in re.findall(r"!\[\w+\]\((.*)\)", report):
        assert (compared / picture).stat().st_size > 0


@pytest.mark.slow
def test_memory_and_time_of_every_recipe_are_measured(compared: Path) -> None:
    costs = json.loads((compared / "report.json").read_text())["costs"]
    assert [(c["recipe"], c["ims_per_gpu"]) for c in costs] == [
        ("bn", 1), ("gn", 1), ("bn", 2), ("gn", 2),
    ]  # fmt: skip
    assert all(cost["activation_mb"] > 10 and cost["seconds"] > 0 for cost in costs)


@pytest.mark.slow
def test_comparing_again_trains_nothing_and_an_interrupted_run_goes_on(
    compared: Path, shapes: Path, call_main: Callable
) -> None:
    before = steps_of(compared)
    interrupted = compared / "runs" / "gn-1ims-seed1"
    (interrupted / "results.json").unlink()
    (interrupted / "model_final.pth").unlink()
    (interrupted / "last_checkpoint").write_text("model_0000001.pth")
    assert call_main(PROGRAM, *flags(shapes, compared, seeds=(0, 1, 1))) == 0
    after = steps_of(compared)
    assert [name for name in before if after[name] > before[name]] == ["gn-1ims-seed1"]
    assert (interrupted / "results.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [*f[:-1], 7], r"bn-1ims-seed0 holds a run with other settings: TEST\.EVAL_PERI"),
        (lambda f: [*f, "MODEL.RESNETS.DEPHT", 34], "did you mean MODEL.RESNETS.DEPTH"),
    ],
)
def test_what_is_there_is_not_overwritten(
    change: Callable, message: str, compared: Path, shapes: Path, call_main: Callable
) -> None:
    before = steps_of(compared)
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, *change(flags(shapes, compared)))
    assert steps_of(compared) == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda s, o: flags(s, o, "bn", "nothing"), r"nothing\.yaml does not exist"),
        (lambda s, o: flags(s, o, "bn", "bn"), "two recipes are called bn"),
        (lambda s, o: without_val(flags(s, o)), "the runs have no held-out set: give --val"),
        (lambda s, o: flags(s / "gone", o), r"gone.*train\.json does not exist"),
        (lambda s, o: [*flags(s, o), "MODEL.WEIGHTS", "gone.pth"], r"weights gone\.pth do not"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    asked: Callable, message: str, shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    with pytest.raises(InputError, match=message):
        call_main(PROGRAM, *asked(shapes, tmp_path / "output"))
    assert not (tmp_path / "output" / "runs").exists()


@pytest.mark.slow
def test_results_on_other_data_are_not_taken_for_those_of_the_new(
    compared: Path, edit_shapes: Callable, call_main: Callable
) -> None:
    before = (compared / "measured.csv").read_text()
    shapes = edit_shapes(lambda dataset: dataset["annotations"].pop())
    with pytest.raises(InputError, match="the set custom_train is another than the run began with"):
        call_main(PROGRAM, *flags(shapes, compared))
    assert (compared / "measured.csv").read_text() == before


@pytest.mark.slow
def test_a_recipe_shown_beside_may_differ_and_the_report_says_so(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "output"
    wide = tmp_path / "wide.yaml"
    wide.write_text(f'_BASE_: "{RECIPES / "gn.yaml"}"\nMODEL:\n  FPN:\n    OUT_CHANNELS: 32\n')
    common = [
        "--ims-per-gpu", 2, "--seeds", 0, "--output", output, *folder_flags(shapes), *SETTINGS,
        "SOLVER.MAX_ITER", 1,
    ]  # fmt: skip
    recipe = RECIPES / "gn.yaml"
    with pytest.raises(InputError, match=r"MODEL\.FPN\.OUT_CHANNELS is 64 in gn, 32 in wide"):
        call_main(PROGRAM, "--recipes", recipe, wide, *common)
    assert call_main(PROGRAM, "--recipes", recipe, "--beside", wide, *common) == 0
    report = (output / "report.md").read_text()
    assert "Shown beside, and not equal: wide." in report
    assert "`MODEL.FPN.OUT_CHANNELS`: 64 in gn, 32 in wide" in report


@pytest.mark.slow
def test_a_run_that_diverges_is_an_outcome(
    shapes: Path, tmp_path: Path, call_main: Callable
) -> None:
    output = tmp_path / "output"
    wild = ["SOLVER.BASE_LR", 1e6, "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SOLVER.MAX_ITER", 4]
    status = call_main(
        PROGRAM, "--recipes", RECIPES / "frozenbn.yaml", "--ims-per-gpu", 2, "--seeds", 0,
        "--output", output, *folder_flags(shapes), *SETTINGS, *wild, "SOLVER.CHECKPOINT_PERIOD", 9,
    )  # fmt: skip
    assert status == 1
    report = (output / "report.md").read_text()
    assert "0 of 1 finished" in report and "## What did not finish" in report
    assert re.search(
        r"- frozenbn, 2 at a time, seed 0: error: iteration \d: .*(not finite|NaN)", report
    )
