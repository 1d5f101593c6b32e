"""What one value of a config can be: rules, which say in words what it has to be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from gn_det.text import nearest

__all__ = [
    "Rule",
    "above",
    "at_least",
    "between",
    "device_name",
    "each",
    "expected_result",
    "folder",
    "increasing",
    "norm_name",
    "not_empty",
    "number",
    "one_of",
    "registered_name",
    "timm_name",
    "value_range",
    "whole",
]

Rule = Callable[[Any], str]  # what a value has to be; empty where it is


def at_least(least: float) -> Rule:
    return lambda value: "" if _is_number(value) and value >= least else f"at least {least}"


def above(limit: float) -> Rule:
    return lambda value: "" if _is_number(value) and value > limit else f"above {limit}"


def between(low: float, high: float) -> Rule:
    def rule(value: Any) -> str:
        return "" if _is_number(value) and low <= value <= high else f"from {low} to {high}"

    return rule


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    def rule(value: Any) -> str:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        fits = is_whole and low <= value <= high
        return "" if fits else f"a whole number from {low} to {high}"

    return rule


def one_of(*choices: Any) -> Rule:
    def rule(value: Any) -> str:
        if value in choices:
            return ""
        names = [repr(choice) if choice == "" else str(choice) for choice in choices]
        return f"one of {', '.join(names)}{nearest(str(value), names)}"

    return rule


def each(rule: Rule, least: int = 1) -> Rule:
    """Of a list with at least so many items."""

    def of_each(values: Any) -> str:
        if not isinstance(values, (list, tuple)) or len(values) < least:
            return f"a list of at least {least}"
        return next((f"a list of which each is {wrong}" for v in values if (wrong := rule(v))), "")

    return of_each


def number(value: Any) -> str:
    return "" if _is_number(value) else "a number"


def not_empty(value: Any) -> str:
    return "" if value else "not empty"


def folder(value: Any) -> str:
    return not_empty(value) or ("a folder of this machine" if "://" in value else "")


def increasing(values: Any) -> str:
    rises = all(map(_is_number, values)) and all(a <= b for a, b in pairwise(values))
    return "" if rises else "numbers in increasing order"


def value_range(values: Any) -> str:
    is_range = len(values) in (0, 2) and all(map(_is_number, values))
    rises = is_range and (not values or values[0] < values[1])
    return "" if rises else "[low, high], or []"


_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
# How the field's other libraries, and hands in a hurry, write their names.
_NORM_ALIASES = {"groupnorm": "GN", "batchnorm": "BN", "batchnorm2d": "BN", "layernorm": "LN"}


def norm_name(value: Any) -> str:
    if value in _NORMS:
        return ""
    meant = {name.lower(): name for name in _NORMS} | _NORM_ALIASES
    known = meant.get(str(value).lower())
    hint = f"; did you mean {known}?" if known else ""
    return f"one of {', '.join(name or repr(name) for name in _NORMS)}{hint}"


def device_name(value: Any) -> str:
    return "" if re.fullmatch(r"cpu|cuda(:\d+)?|meta", str(value)) else "cpu, cuda or cuda:N"


def registered_name(registry: str, *others: str) -> Rule:
    """A name of one of Detectron2's registries, in detectron2.modeling."""

    def rule(value: Any) -> str:
        import detectron2.modeling

        names = [name for name, _ in getattr(detectron2.modeling, registry)]
        return one_of(*others, *names)(value) and (
            f"a name of Detectron2's {registry}{nearest(str(value), names)}"
        )

    return rule


def timm_name(value: Any) -> str:
    from gn_det.modeling.timm_backbone.names import timm_name_problem

    return timm_name_problem(value) if value else ""


def expected_result(row: Any) -> str:
    fits = isinstance(row, (list, tuple)) and len(row) == 4 and all(map(_is_number, row[2:]))
    return "" if fits else "[task, metric, value, tolerance]"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
