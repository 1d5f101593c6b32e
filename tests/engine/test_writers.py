"""A run whose log or metrics cannot be written goes on, and says so once."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from detectron2.utils.events import EventStorage

from gn_det import InputError
from gn_det.engine.folders import write_results
from gn_det.engine.process import set_up_process
from gn_det.engine.writers import build_writers

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")


@pytest.fixture(autouse=True)
def _no_other_handlers() -> Iterator[None]:
    """Detectron2 gives a logger its handlers once in a process; those of other tests go."""
    names = ("fvcore", "detectron2", "gn_det")
    before = {name: logging.getLogger(name).handlers[:] for name in names}
    for name in names:
        logging.getLogger(name).handlers.clear()
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers[:] = handlers


def fill(file: Path) -> Path:
    """Let a file be on a disk that is full."""
    file.symlink_to("/dev/full")
    return file


def test_metrics_that_cannot_be_written_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path / "metrics.json")
    with EventStorage(0) as storage:
        writers = build_writers(str(tmp_path), max_iter=100)
        for _ in range(3):
            storage.put_scalar("loss", 1.0)
            for writer in writers:
                writer.write()
            storage.step()
        for writer in writers:
            writer.close()
    said = [r.getMessage() for r in caplog.records if "cannot write" in r.getMessage()]
    assert said == [
        "JSONWriter cannot write (No space left on device): the training goes on without it"
    ]


def test_a_log_that_cannot_be_written_is_said_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "log.txt")
    set_up_process(tmp_path, seed=3)
    logger = logging.getLogger("gn_det")
    for number in range(3):
        logger.info(f"line {number}")
    captured = capfd.readouterr()
    assert captured.err.count("log.txt cannot be written: No space left on device") == 1
    assert "the run goes on without it" in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize("name", ["results.json", "environment.txt"])
def test_a_file_of_a_run_that_cannot_be_written_is_one_line(name: str, tmp_path: Path) -> None:
    fill(tmp_path / f"{name}.partial")
    with pytest.raises(InputError, match=rf"{name} cannot be written: No space .* \(.* MiB free\)"):
        if name == "results.json":
            write_results(str(tmp_path), {"bbox": {"AP": 1.0}})
        else:
            set_up_process(tmp_path, seed=3)
    assert not (tmp_path / name).exists()
