"""tools/report_run.py on a finished run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gn_det import InputError, get_config


@pytest.fixture
def run(shapes: Path, tmp_path: Path) -> Path:
    """The files of a finished run that the report reads."""
    folder = tmp_path / "run"
    (folder / "inference").mkdir(parents=True)
    cfg = get_config("small/quickstart.yaml")
    cfg.DATASETS.COCO_FOLDERS = [["custom_val", str(shapes / "val.json"), str(shapes / "images")]]
    cfg.DATASETS.TEST = ("custom_val",)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "metrics.json").write_text(json.dumps({"iteration": 1, "total_loss": 2.0}))
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    results = {"bbox": {"AP": 12.34, "APl": None}, "segm": {"AP": 56.78, "AP50": 71.0}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_table_holds_what_the_evaluation_returned(
    run: Path, call_main: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    call_main("tools/report_run.py", run)
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}
    assert rows["box"] == ["12.3", "-", "-", "-", "-", "-"]
    assert rows["mask"] == ["56.8", "71.0", "-", "-", "-", "-"]
    for file in ("curves.png", "contact_sheet.png"):
        assert str(run / file) in output
        assert (run / file).stat().st_size > 0


def test_a_run_that_is_not_finished_is_told(run: Path, call_main: Callable) -> None:
    (run / "results.json").unlink()
    with pytest.raises(InputError, match="not finished, or had nothing to evaluate on"):
        call_main("tools/report_run.py", run)


def test_a_run_on_several_sets_is_not_of_one_table(run: Path, call_main: Callable) -> None:
    cfg = get_config("small/quickstart.yaml")
    cfg.DATASETS.TEST = ("a", "b")
    (run / "config.yaml").write_text(cfg.dump())
    with pytest.raises(InputError, match=r"evaluated on 2 data sets, .*results\.json"):
        call_main("tools/report_run.py", run)


def test_a_run_on_a_registered_set_has_no_contact_sheet(run: Path, call_main: Callable) -> None:
    cfg = get_config("small/quickstart.yaml")
    cfg.DATASETS.TEST = ("coco_2017_val",)
    (run / "config.yaml").write_text(cfg.dump())
    call_main("tools/report_run.py", run)
    assert not (run / "contact_sheet.png").exists()
