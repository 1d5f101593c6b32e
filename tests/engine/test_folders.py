"""The folder of a run."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from gn_det import InputError
from gn_det.engine.command import RunOptions
from gn_det.engine.folders import clear_half_written, new_folder, run_folder, write_results

FRESH = RunOptions()


def test_a_new_folder_is_created_with_its_parents_and_stays(tmp_path: Path) -> None:
    with run_folder(str(tmp_path / "a" / "b"), FRESH) as folder:
        (folder / "log.txt").touch()
    assert (tmp_path / "a" / "b" / "log.txt").exists()


def test_bad_input_leaves_no_new_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad"), run_folder(str(tmp_path / "a"), FRESH) as folder:
        (folder / "log.txt").touch()
        raise InputError("bad")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("begun", ["before", "during"])
def test_bad_input_never_takes_what_was_there(tmp_path: Path, begun: str) -> None:
    path = tmp_path / "a"
    if begun == "before":
        path.mkdir()
    with pytest.raises(InputError, match="bad"), run_folder(str(path), FRESH) as folder:
        (folder / "last_checkpoint").write_text("model_0000001.pth")
        raise InputError("bad")
    assert (path / "last_checkpoint").exists()


@pytest.mark.parametrize("left", ["last_checkpoint", "metrics.json"])
def test_a_run_is_not_overwritten_but_resumed_and_evaluated(tmp_path: Path, left: str) -> None:
    (tmp_path / left).write_text("{}")
    with pytest.raises(InputError, match="holds a run already; --resume"):
        run_folder(str(tmp_path), FRESH).__enter__()
    for options in (RunOptions(resume=True), RunOptions(eval_only=True)):
        with run_folder(str(tmp_path), options) as folder:
            assert folder == tmp_path


def test_what_a_failed_start_left_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").touch()
    (tmp_path / "config.yaml").write_text("A: 1")
    with run_folder(str(tmp_path), FRESH) as folder:
        assert folder == tmp_path


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run cannot be written: Not a directory"):
        run_folder(str(tmp_path / "file" / "run"), FRESH).__enter__()


def test_results_are_strict_json(tmp_path: Path) -> None:
    write_results(str(tmp_path), {"bbox": {"AP": 12.5, "APl": float("nan")}})
    text = (tmp_path / "results.json").read_text()
    assert json.loads(text) == {"bbox": {"AP": 12.5, "APl": None}} and "NaN" not in text
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_results_do_not_go_among_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="exists and is no empty folder; name another"):
        new_folder(tmp_path).__enter__()
    with new_folder(tmp_path / "a") as folder:
        assert folder.is_dir()


def test_bad_input_after_weights_were_written_leaves_them(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad"), new_folder(tmp_path / "a") as folder:
        (folder / "model_gn.pth").touch()
        raise InputError("bad")
    assert (tmp_path / "a" / "model_gn.pth").exists()


def test_bad_input_removes_what_this_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bad"), run_folder(str(tmp_path / "a"), FRESH) as folder:
        for name in ("log.txt", "seed.txt", "notes.txt"):
            (folder / name).write_text("x")
        raise InputError("bad")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["notes.txt"]


def test_files_of_others_that_end_in_partial_stay(tmp_path: Path) -> None:
    for name in ("model_0000001.pth.partial", "results.json.partial", "thesis.tex.partial"):
        (tmp_path / name).touch()
    clear_half_written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex.partial"]


def test_two_programs_do_not_begin_in_one_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as folder:
        with pytest.raises(InputError, match="at work in|no empty folder"):
            new_folder(folder).__enter__()
        assert folder.joinpath(".lock").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with run_folder(str(tmp_path), FRESH):
        for options in (FRESH, RunOptions(resume=True)):
            with pytest.raises(InputError, match=f"at work in .*: process {os.getpid()} on .* sin"):
                run_folder(str(tmp_path), options).__enter__()
        with run_folder(str(tmp_path), RunOptions(eval_only=True)):  # it writes elsewhere
            pass
    with run_folder(str(tmp_path), FRESH):
        pass


def test_machines_of_one_run_share_its_folder(tmp_path: Path) -> None:
    with (
        run_folder(str(tmp_path), RunOptions(num_machines=2)),
        run_folder(str(tmp_path), RunOptions(num_machines=2, machine_rank=1)) as folder,
    ):
        assert folder == tmp_path


def test_a_file_system_without_locks_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with run_folder(str(tmp_path), FRESH):
        assert "cannot be locked (No locks available)" in capsys.readouterr().out
