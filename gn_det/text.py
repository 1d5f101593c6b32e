"""Text in one line, in tables and in Markdown, foreign text included."""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "csv_text",
    "markdown",
    "nearest",
    "path_of",
    "printable",
    "reason_of",
    "shortened",
    "table",
]

# Not printable to Python, and part of emoji and of Persian and Indic words.
_JOINERS = "\u200c\u200d"
# What would end a cell, or be set as code or HTML, as entities: a backslash before it does not help
# where another one precedes.
_MARKDOWN = {ord(character): f"&#{ord(character)};" for character in "&<`|"}


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


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Comma-separated values, a line for each row."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def shortened(items: Iterable[object], most: int) -> str:
    """The first items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item) for item in items[:most]) + more


def nearest(name: str, candidates: Sequence[str]) -> str:
    """``"; did you mean X?"`` for the candidate that resembles name most, or ``""``."""
    by_letters = {candidate.lower(): candidate for candidate in candidates}
    matches = difflib.get_close_matches(name.lower(), by_letters, n=1, cutoff=0.5)
    return f"; did you mean {by_letters[matches[0]]}?" if matches else ""


def reason_of(error: BaseException) -> str:
    """What an error says, in one line: that of the system where there is one."""
    lines = str(error).splitlines()
    said = getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__)
    return printable(said)


def path_of(path: str, name: str) -> str:
    """The path of a part of the module at a path, "" for the whole model."""
    return f"{path}.{name}" if path else name
