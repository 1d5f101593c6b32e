"""What goes wrong around a program is told from what is wrong in it."""

from __future__ import annotations

import errno
import logging
import sys
from types import SimpleNamespace

import pytest

from gn_det import InputError
from gn_det.engine.faults import fault_of, telling_faults
from gn_det.engine.process import _go_on_without
from gn_det.files import writing

KILLED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
FAULTS = [
    (KILLED, r"a loading process ended \(DataLoader worker \(pid 7\) is killed .*memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. x"), "/dev/shm, was"),
    (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "a loading process ended"),
    (OSError(errno.EMFILE, "Too many open files"), "too many open files"),
    (
        OSError(errno.ENOSPC, "No space", "results.json"),
        r"results.json cannot be written: No space",
    ),
    (
        OSError(errno.EROFS, "Read-only"),
        "a file, .* or shared memory in /dev/shm cannot be written",
    ),
    (
        OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
        r"x\.\.\.x+ is no usable name: File",
    ),
    (OSError(errno.ENOTDIR, "Not a directory", "a.txt/b"), "a.txt/b is no usable name: Not a dir"),
    (RuntimeError("a defect"), None),
    (FileNotFoundError(errno.ENOENT, "No such file", "x"), None),
]


@pytest.mark.parametrize(("error", "message"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_is_one_line_and_a_defect_stays(error: Exception, message: str | None) -> None:
    with pytest.raises(InputError if message else type(error), match=message), telling_faults():
        raise error


def test_a_lost_connection_is_no_file_that_cannot_be_written() -> None:
    with pytest.raises(ConnectionResetError), writing("results.json"):
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(InputError, match="results.json cannot be written"), writing("results.json"):
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(("error", "said"), [(KILLED, 0), (RuntimeError("a defect"), 1)])
def test_faults_that_python_cannot_raise_are_not_reported(
    error: Exception, said: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    with telling_faults():
        sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert len(reported) == said


@pytest.mark.parametrize(("error", "said"), [(KILLED, False), (ValueError("a defect"), True)])
def test_a_signal_of_a_loading_process_in_a_log_line_leaves_no_trace(
    error: Exception, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    record = logging.LogRecord("gn_det", logging.INFO, "x.py", 1, "a line", (), None)
    try:
        raise error
    except Exception:
        _go_on_without(logging.StreamHandler(), record)
    assert ("Logging error" in capsys.readouterr().err) == said


def test_an_input_error_is_its_own_fault() -> None:
    error = InputError("bad")
    assert fault_of(error) is error
