"""The table of what was measured: a row for each recipe on a data set, as CSV."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from gn_det.errors import InputError
from gn_det.files import check_regular_file
from gn_det.text import csv_text, reason_of

__all__ = ["MEASURED", "Row", "read_rows", "rows_text"]

# What recommendations rest on; tools/compare.py writes files of the same form.
MEASURED = Path(__file__).with_name("measured.csv")


@dataclass(frozen=True)
class Row:
    """What a recipe reached.

    Attributes:
        data: name of the data set.
        pictures, classes, objects_per_picture, object_size: see
            :class:`gn_det.data.facts.DataFacts`, of the training pictures.
        recipe: its name, the stem of its config.
        config: the file, from the folder of the checkout.
        overrides: "KEY VALUE ..." of its keys.
        weights: stem of the file that it began with, "none" for a random start.
        ims_per_batch: images of a step.
        steps: of the whole training.
        lr: highest learning rate.
        box_ap, mask_ap: COCO AP on the held-out pictures, means over the seeds; None for none.
        box_deviation, mask_deviation: sample standard deviations, 0 for one seed.
        seeds: how many finished.
        commit: at which it was measured; empty where that is not known.
        note: what else is to be known of the row.
    """

    data: str
    pictures: int
    classes: int
    objects_per_picture: float
    object_size: float
    recipe: str
    config: str
    overrides: str
    weights: str
    ims_per_batch: int
    steps: int
    lr: float
    box_ap: float
    box_deviation: float
    mask_ap: float | None
    mask_deviation: float | None
    seeds: int
    commit: str = ""
    note: str = ""

    @property
    def key(self) -> tuple[object, ...]:
        """What was measured; the other columns are what came of it."""
        data = self.data, self.pictures
        recipe = self.recipe, self.config, self.overrides, self.weights
        return *data, *recipe, self.ims_per_batch, self.steps

    @property
    def ims_at_a_time(self) -> int:
        """Images of a forward pass, of which a step may add up several."""
        words = shlex.split(self.overrides)
        keys = dict(zip(words[::2], words[1::2], strict=False))
        return self.ims_per_batch // int(keys.get("SOLVER.ACCUMULATE_STEPS", 1))

    @property
    def images(self) -> int:
        """That the training saw."""
        return self.steps * self.ims_per_batch

    @property
    def ap(self) -> float:
        """Mean of box and mask AP; box AP where there are no masks."""
        return self.box_ap if self.mask_ap is None else (self.box_ap + self.mask_ap) / 2


_COLUMNS = [field.name for field in fields(Row)]
# What a data set is compared by, in proportion, and what divides.
_ABOVE_ZERO = {
    *("pictures", "classes", "objects_per_picture", "object_size"),
    *("ims_per_batch", "steps", "lr", "seeds"),
}
_KINDS = {field.name: str(field.type) for field in fields(Row)}


def rows_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, numbers to six digits."""
    return csv_text(_COLUMNS, [[_shown(value) for value in astuple(row)] for row in rows])


def read_rows(file: str | Path) -> list[Row]:
    """Read what :func:`rows_text` wrote.

    Raises:
        InputError: no such file, other columns, or a value that is none of its column.
    """
    check_regular_file(file, "measurements file")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {reason_of(error)}") from error
    lines = csv.DictReader(io.StringIO(text, newline=""))
    if lines.fieldnames != _COLUMNS:
        raise InputError(
            f"{file} has the columns {lines.fieldnames}, and a table of measurements has {_COLUMNS}"
        )
    return [_row(file, lines.line_num, line) for line in lines]


def _row(file: str | Path, number: int, line: dict[str, str]) -> Row:
    values = {}
    for column, kind in _KINDS.items():
        text = line.get(column) or ""
        try:
            values[column] = _value(kind, text)
            if column in _ABOVE_ZERO and not values[column]:
                raise ValueError
        except ValueError as error:
            raise InputError(f"{file}, line {number}: {column} is {text!r}, no {kind}") from error
    return Row(**values)


def _value(kind: str, text: str) -> str | int | float | None:
    if kind == "str":
        return text
    if kind == "float | None" and not text:
        return None
    number = int(text) if kind == "int" else float(text)
    if not math.isfinite(number) or number < 0:
        raise ValueError
    return number


def _shown(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value
