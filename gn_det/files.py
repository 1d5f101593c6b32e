"""Files that are read whole, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from gn_det.errors import InputError
from gn_det.text import reason_of

__all__ = [
    "PARTIAL",
    "check_folder",
    "check_regular_file",
    "json_text",
    "make_folder",
    "read_json",
    "unwritable",
    "whole_file",
    "write_atomically",
    "write_json",
    "writing",
]

T = TypeVar("T")

PARTIAL = ".partial"  # what is being written, beside what it will be


def check_regular_file(path: str | Path, what: str) -> None:
    """Check that a file is there that can be read to its end: no folder, device, pipe or socket.

    Args:
        path: of the file.
        what: it should be.

    Raises:
        InputError: it is not.
    """
    does, is_ = ("do", "are") if what.endswith("s") else ("does", "is")
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{what} {path} {does} not exist") from error
        raise InputError(f"{what} {path} cannot be read: {reason_of(error)}") from error
    if not stat.S_ISREG(mode):
        raise InputError(f"{what} {path} {is_} no file, but a folder, device, pipe or socket")


def check_folder(path: str | Path, of: str) -> None:
    """Check that a folder is there.

    Args:
        path: of the folder.
        of: what it should hold.

    Raises:
        InputError: it is not there, is something else, or cannot be looked at.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_folder = False
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {reason_of(error)}") from error
    if not is_folder:
        raise InputError(f"{path} is not a folder of {of}")


def make_folder(path: Path) -> None:
    """Create a folder with its parents, and check that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"folder {path} cannot be written: {error.strerror}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears complete, and on the disk, or stays as it was.

    Whatever interrupts the writing, a loss of power included, path is never half-written. A link
    stays one.

    Raises:
        InputError: it cannot be written, or is a folder, device, pipe or socket.
    """
    target = Path(os.path.realpath(path))
    if os.path.exists(target) and not os.path.isfile(target):
        raise InputError(
            f"{path} cannot be written: it is no file, but a folder, device, pipe or socket"
        )
    partial = target.with_name(target.name + PARTIAL)
    try:
        with writing(path):
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text in UTF-8 as a :func:`whole_file`, with its errors."""
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise an InputError, see :func:`unwritable`, where a file or folder cannot be written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError while it handles the system's.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or isinstance(cause, ConnectionError):  # of a process
            raise
        raise InputError(unwritable(path, cause)) from error


def unwritable(path: str | Path, error: OSError) -> str:
    """The text of an error: the file cannot be written, why, and the space left on a full disk."""
    text = f"{path} cannot be written: {reason_of(error)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = shutil.disk_usage(Path(path).absolute().parent).free
            text += f" ({free / 2**20:.1f} MiB free)"
    return text


def read_json(path: Path, kind: type[T]) -> T:
    """What a program of gn_det wrote as JSON.

    Args:
        path: the file.
        kind: dict or list, which it has to hold.

    Raises:
        FileNotFoundError, NotADirectoryError: it is not there.
        InputError: it cannot be read, is damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({reason_of(error)}); remove it") from error
    if not isinstance(content, kind):
        raise InputError(
            f"{path} holds a {type(content).__name__} in place of a {kind.__name__}; remove it"
        )
    return content


def write_json(path: Path, content: Any) -> None:
    """Write :func:`json_text` as a :func:`whole_file`, with its errors."""
    write_atomically(path, json_text(content) + "\n")


def json_text(content: Any) -> str:
    """JSON with null in place of NaN and infinity, which JSON does not have."""
    return json.dumps(_with_null(content), indent=2, allow_nan=False)


def _with_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
