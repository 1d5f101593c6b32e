"""Helpers that every layer may use."""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from gn_det.errors import InputError

__all__ = [
    "PARTIAL",
    "amp_dtype",
    "check_regular_file",
    "commit",
    "make_folder",
    "markdown",
    "nearest",
    "path_of",
    "printable",
    "read_json",
    "reason_of",
    "shortened",
    "table",
    "unwritable",
    "whole_file",
    "with_null",
    "write_atomically",
    "writing",
]

T = TypeVar("T")

PARTIAL = ".partial"  # what is being written, beside what it will be

# Not printable to Python, and part of emoji and of Persian and Indic words.
_JOINERS = "\u200c\u200d"
# What would end a cell, or be set as code or HTML, as entities: a backslash before it does not help
# where another one precedes.
_MARKDOWN = {ord(character): f"&#{ord(character)};" for character in "&<`|"}


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


def commit() -> str | None:
    """That of the checkout that gn_det is in, marked where it has changes; None outside of one."""
    asked = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    try:
        done = subprocess.run(asked, cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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


def nearest(name: str, candidates: Sequence[str]) -> str:
    """``"; did you mean X?"`` for the candidate that resembles name most, or ``""``."""
    by_letters = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=0.5)
    return f"; did you mean {by_letters[matches[0]]}?" if matches else ""


def path_of(path: str, name: str) -> str:
    """The path of a part of the module at a path, "" for the whole model."""
    return f"{path}.{name}" if path else name


def printable(text: object, keep: str = "") -> str:
    """A foreign text as it can be shown: in one line, what is not printable as its escape.

    Names that come from a file may hold escape sequences, line breaks and marks that turn the
    direction of writing. Letters of all scripts and emoji stay.

    Args:
        text: of which str() is shown.
        keep: characters to leave as they are, such as line breaks between lines of ours.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in _JOINERS or character in keep
        else character.encode("unicode_escape").decode()
        for character in text
    )


def markdown(text: object) -> str:
    """A foreign text for a Markdown page or table, :func:`printable` and without markup."""
    return printable(text).translate(_MARKDOWN).replace("](", "]&#40;")  # of links and pictures


def table(
    rows: Iterable[Sequence[object]],
    headers: Sequence[str] = (),
    tablefmt: str = "simple",
    **options: Any,
) -> str:
    """tabulate's table of cells that may hold foreign text.

    Args:
        rows, headers: texts in them become :func:`printable`, or :func:`markdown` for "github".
        tablefmt, **options: of tabulate.
    """
    from tabulate import tabulate  # which `import gn_det` does without

    shown = markdown if tablefmt == "github" else printable
    cells = [
        [shown(cell) if isinstance(cell, (str, Path)) else cell for cell in row] for row in rows
    ]
    return tabulate(cells, list(map(shown, headers)), tablefmt=tablefmt, **options)


def shortened(items: Iterable[object], most: int) -> str:
    """The first items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more


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


def reason_of(error: BaseException) -> str:
    """What an error says, in one line: that of the system where there is one."""
    lines = str(error).splitlines()
    said = getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__)
    return printable(said)


def with_null(value: Any) -> Any:
    """Results with None in place of NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {key: with_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_null(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def unwritable(path: str | Path, error: OSError) -> str:
    """The text of an error: the file cannot be written, why, and the space left on a full disk."""
    text = f"{path} cannot be written: {reason_of(error)}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            free = shutil.disk_usage(Path(path).absolute().parent).free
            text += f" ({free / 2**20:.1f} MiB free)"
    return text


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


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears complete, and on the disk, or stays as it was.

    Whatever interrupts the writing, a loss of power included, path is never half-written.

    Raises:
        InputError: it cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with writing(path):
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text in UTF-8 as a :func:`whole_file`, with its errors."""
    with whole_file(path) as file:
        file.write(text.encode())


def amp_dtype(enabled: bool) -> torch.dtype | None:
    """The dtype of mixed precision on this GPU: bfloat16 where it has it, else float16."""
    if not enabled:
        return None
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16
