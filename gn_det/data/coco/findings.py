"""What was found in a data set: mended, dropped, warned of, or a reason to refuse it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field

from tabulate import tabulate

from gn_det.errors import InputError
from gn_det.text import printable

__all__ = ["DroppedError", "Findings", "RefusedError", "shown"]

_VERDICTS = ("mended", "dropped", "warned", "refused")
_LONGEST = 100  # characters of a value
_NAMED = 3  # places of a kind that a message names


class RefusedError(Exception):
    """Something that has no meaning: what it is, in the plural, and its value."""


class DroppedError(Exception):
    """An annotation that nothing can be learnt from: what is wrong with such, and its value."""


@dataclass
class _Row:
    count: int = 0
    example: str = ""
    places: list[str] = field(default_factory=list)


class Findings:
    """Counts and examples of each kind of finding in a data set.

    Args:
        json_file: named in the error and above the table.
        strict: whether what would be dropped is refused.

    Attributes:
        changed: whether the data set is no longer what its file holds.
    """

    def __init__(self, json_file: str, *, strict: bool = False) -> None:
        self.json_file = json_file
        self.changed = False
        self._strict = strict
        self._rows: dict[tuple[str, str], _Row] = {}

    def add(
        self, verdict: str, what: str, place: str, *values: object, text: str = "", count: int = 1
    ) -> None:
        """Count one more.

        Args:
            verdict: "mended", "dropped", "warned" or "refused".
            what: the kind, in the plural.
            place: where it is, such as "annotation 7".
            values: what stands there, to be :func:`shown`.
            text: the same in words.
            count: how many of the kind there are at this place.
        """
        if verdict == "dropped" and self._strict:
            verdict = "refused"
        self.changed |= verdict in ("mended", "dropped")
        row = self._rows.setdefault((verdict, what), _Row())
        if not row.count:
            text = text or ", ".join(map(shown, values))
            row.example = printable(f"{place}: {text}" if text else place)
        if row.count < _NAMED:
            row.places.append(printable(place))
        row.count += count

    def count(self, *verdicts: str) -> int:
        """How many findings have one of these verdicts."""
        return sum(row.count for (verdict, _), row in self._rows.items() if verdict in verdicts)

    def sentence(self, *verdicts: str) -> str:
        """Every kind with one of these verdicts in one line, with counts and an example."""
        return "; ".join(
            f"{row.count} {what} ({row.example}{_others(row)})"
            for (verdict, what), row in self._rows.items()
            if verdict in verdicts
        )

    def check(self) -> None:
        """Raise an InputError in one line where something is refused."""
        if self.count("refused"):
            raise InputError(f"{self.json_file} is refused: {self.sentence('refused')}")

    def table(self) -> str:
        """What was mended, dropped and warned of, with counts and examples; "" for nothing."""
        rows = [
            (verdict, row.count, what, row.example + _others(row))
            for (verdict, what), row in sorted(
                self._rows.items(), key=lambda item: _VERDICTS.index(item[0][0])
            )
        ]
        return tabulate(rows, headers=["", "count", "what", "example"]) if rows else ""


def _others(row: _Row) -> str:
    others = [place.partition(" ")[2] or place for place in row.places[1:]]
    more = f" and {row.count - len(row.places)} more" if row.count > len(row.places) else ""
    return f"; also {', '.join(others)}{more}" if others else ""


_short = reprlib.Repr()
_short.maxlist = _short.maxdict = 6
_short.maxstring = _short.maxother = 60


def shown(value: object) -> str:
    """A value in a few dozen characters, on one line, with nothing that a terminal obeys."""
    text = _short.repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
