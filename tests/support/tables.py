"""Tables of tests that are products of columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

import pytest
from _pytest.mark import ParameterSet


def every_pair(*columns: Mapping[str, object] | Iterable[object]) -> list[ParameterSet]:
    """The product of three columns or more, of which half is slow.

    Any two values of two columns meet in the other half, which `make test` runs.

    Args:
        columns: values by their names in the tests' ids, or values that name themselves.
    """
    named = [
        list(column.items() if isinstance(column, Mapping) else ((str(v), v) for v in column))
        for column in columns
    ]
    assert len(named) >= 3
    rows = []
    for numbers in product(*(range(len(column)) for column in named)):
        names, values = zip(*(c[i] for c, i in zip(named, numbers, strict=True)), strict=True)
        marks = pytest.mark.slow if sum(numbers) % 2 else ()
        rows.append(pytest.param(*values, id="-".join(names), marks=marks))
    return rows
