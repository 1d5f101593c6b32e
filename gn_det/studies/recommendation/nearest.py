"""The measured data set that is nearest to another, and the best of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gn_det.data.facts import DataFacts
from gn_det.studies.recommendation.measured import Row

__all__ = ["LIMITS", "best_row", "far_in", "nearest_rows"]

# By which factor a data set may differ from a measured one for its rows to say something of it.
LIMITS = {"pictures": 2.0, "classes": 4.0, "objects_per_picture": 4.0, "object_size": 2.0}


def nearest_rows(facts: DataFacts, rows: Sequence[Row]) -> list[Row]:
    """The rows of the data set, and the part of it, that is nearest.

    Distance is the largest of the factors in which two sets differ, each relative to its limit.
    """
    if not rows:
        return []
    nearest = min(rows, key=lambda row: _distance(facts, row))
    return [row for row in rows if _set_of(row) == _set_of(nearest)]


def far_in(facts: DataFacts, row: Row) -> dict[str, tuple[float, float]]:
    """In what a data set differs from that of a row by more than LIMITS: its value and the row's.

    Empty where the row is near.
    """
    return {
        key: (getattr(facts, key), getattr(row, key))
        for key, limit in LIMITS.items()
        if _factor(facts, row, key) > limit
    }


def best_row(rows: Sequence[Row], images_that_fit: int) -> Row | None:
    """The row with the highest AP among the longest trainings whose batch fits; None where none."""
    fitting = [row for row in rows if row.ims_at_a_time <= images_that_fit]
    return max(fitting, key=lambda row: (row.images, row.ap), default=None)


def _set_of(row: Row) -> tuple[str, int]:
    return row.data, row.pictures


def _distance(facts: DataFacts, row: Row) -> float:
    return max(
        math.log(_factor(facts, row, key)) / math.log(limit) for key, limit in LIMITS.items()
    )


def _factor(facts: DataFacts, row: Row, key: str) -> float:
    ratio = getattr(facts, key) / getattr(row, key)
    return max(ratio, 1 / ratio)
