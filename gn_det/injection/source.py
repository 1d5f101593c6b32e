"""Python source of a generated forward: expressions, signatures, and checks.

Values that have no literal become globals of the generated function, under names of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from gn_det.injection.stand_in import UntraceableError
from gn_det.text import path_of

__all__ = [
    "attribute_checks",
    "body",
    "declared",
    "equals",
    "expression",
    "input_checks",
    "named",
]


def expression(path: str) -> str:
    """``self`` and a path, as Python has to write it."""
    text = "self"
    for name in path.split(".") if path else ():
        text = f"{text}.{name}" if name.isidentifier() else f"getattr({text}, {name!r})"
    return text


def named(value: Any, names: dict[str, Any]) -> str:
    """A name for a value among the generated function's globals."""
    for name, known in names.items():
        if known is value:
            return name
    name = f"gn_det_known_{len(names)}"
    names[name] = value
    return name


def body(graph: fx.Graph, names: dict[str, Any]) -> list[str]:
    """The lines of a graph's forward, behind its signature."""
    code = graph.python_code("self")
    for name, value in code.globals.items():
        if names.setdefault(name, value) is not value:
            raise UntraceableError(f"calls two functions of the name {name}")
    lines = code.src.strip().splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("def forward("))
    return [line[4:] for line in lines[start + 1 :] if line.strip()]


def declared(
    parameters: list[inspect.Parameter], names: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """A signature as that of the original, and the arguments that hand everything on to it."""
    signature, passed_on, starred = [], [], False
    for each in parameters:
        if each.kind is each.VAR_POSITIONAL:
            signature.append(f"*{each.name}")
            passed_on.append(f"*{each.name}")
            starred = True
        elif each.kind is each.VAR_KEYWORD:
            signature.append(f"**{each.name}")
            passed_on.append(f"**{each.name}")
        else:
            if each.kind is each.KEYWORD_ONLY and not starred:
                signature.append("*")
                starred = True
            default = "" if each.default is each.empty else f"={_value(each.default, names)}"
            signature.append(f"{each.name}{default}")
            by_name = f"{each.name}={each.name}"
            passed_on.append(by_name if each.kind is each.KEYWORD_ONLY else each.name)
    return signature, passed_on


def input_checks(parameters: list[inspect.Parameter], names: dict[str, Any]) -> Iterator[str]:
    """That inputs are there, and none that no variant has."""
    for each in parameters:
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            yield f"not {each.name}"
        elif each.default is each.empty:
            yield f"{each.name} is not None"
        elif each.kind is each.KEYWORD_ONLY:
            yield equals(each.name, each.default, names)


def attribute_checks(reads: dict[tuple[str, str], Any], names: dict[str, Any]) -> list[str]:
    """That what the record's Python read is what it was."""
    checks = []
    for (path, name), value in reads.items():
        if isinstance(value, (nn.Module, torch.Tensor)):
            continue
        place = expression(path_of(path, name))
        if isinstance(value, (list, tuple, dict)) and _literal(value) is None:
            checks.append(f"len({place}) == {len(value)}")
        else:
            checks.append(equals(place, value, names))
    return checks


def equals(place: str, value: Any, names: dict[str, Any]) -> str:
    """That an expression has a value."""
    identical = value is None or isinstance(value, bool) or _literal(value) is None
    return f"{place} {'is' if identical else '=='} {_value(value, names)}"


def _value(value: Any, names: dict[str, Any]) -> str:
    literal = _literal(value)
    return named(value, names) if literal is None else literal


def _literal(value: Any) -> str | None:
    """A value as Python writes it; None where it cannot."""
    if type(value) in (list, tuple, dict):
        parts = [*value.keys(), *value.values()] if type(value) is dict else value
        return repr(value) if all(_literal(part) is not None for part in parts) else None
    if type(value) is float and value - value != 0:  # infinite, or no number
        return None
    return repr(value) if value is None or type(value) in (bool, int, float, str) else None
