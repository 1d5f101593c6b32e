"""The types of COCO's values: whole numbers, finite numbers, flags, as JSON files have them."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["finite_numbers", "flag", "parsed", "whole_number"]

_LARGEST = 2**63 - 1  # of NumPy's integers, which evaluations sort ids with
_FALSE = {"", "0", "0.0", "false", "no", "none", "null"}
_TRUE = {"1", "1.0", "true", "yes"}


def whole_number(value: Any) -> int | None:
    """An integer that may be written as 1.0 or "1"; None for everything else."""
    if type(value) is int:
        return value if abs(value) <= _LARGEST else None
    if isinstance(value, str):
        try:
            value = int(value.replace("_", "?"))  # which Python would skip
        except ValueError:
            value = _float(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and abs(value) <= _LARGEST else None


def finite_numbers(values: list[Any]) -> list[float] | None:
    """Numbers, of which some may be text; None where one is neither, or not finite."""
    if not set(map(type, values)) <= {int, float}:
        values = [_float(v) if isinstance(v, str) else v for v in values]
        if not set(map(type, values)) <= {int, float}:
            return None
    try:
        return values if all(map(math.isfinite, values)) else None
    except OverflowError:  # an integer beyond any float
        return None


def flag(value: Any) -> int | None:
    """0 or 1, which may be missing, or written as null, false, 0.0 or "0"; None for the rest."""
    if value is None:
        return 0
    if isinstance(value, str):
        text = value.strip().lower()
        return 0 if text in _FALSE else 1 if text in _TRUE else None
    return int(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def parsed(value: Any) -> Any:
    """A list or object; the one that a text holds in JSON."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _float(text: str) -> float | None:
    try:
        number = float(text.replace("_", "?"))
    except ValueError:
        return None
    return number if math.isfinite(number) else None
