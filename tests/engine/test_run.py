"""The folder of a run."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from gn_det import InputError
from gn_det.engine.run import prepare_output_dir, write_results

FRESH = Namespace(resume=False, eval_only=False)


def test_a_new_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    assert prepare_output_dir(str(tmp_path / "a" / "b"), FRESH).is_dir()


@pytest.mark.parametrize("left", ["last_checkpoint", "metrics.json"])
def test_a_run_is_not_overwritten_but_resumed_and_evaluated(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("{}")
    with pytest.raises(InputError, match="holds a run already; --resume"):
        prepare_output_dir(str(tmp_path), FRESH)
    prepare_output_dir(str(tmp_path), Namespace(resume=True, eval_only=False))
    prepare_output_dir(str(tmp_path), Namespace(resume=False, eval_only=True))


def test_what_a_failed_start_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").touch()
    (tmp_path / "config.yaml").write_text("A: 1")
    prepare_output_dir(str(tmp_path), FRESH)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run cannot be written: Not a directory"):
        prepare_output_dir(str(tmp_path / "file" / "run"), FRESH)


def test_results_are_strict_json(tmp_path: Path) -> None:
    write_results(str(tmp_path), {"bbox": {"AP": 12.5, "APl": float("nan")}})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"bbox": {"AP": 12.5, "APl": None}} and "NaN" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
