"""Whether the code of a module takes the layers of an nn.Sequential by their numbers."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn

from gn_det.injection.kinds import own_methods

__all__ = ["takes_by_number"]

_AT_THE_START = re.compile(r"__init__|\w*(init|reset)\w*")  # which runs before a norm comes


def takes_by_number(owner: type[nn.Module], path: list[str]) -> bool:
    """Whether methods of a class index or number what an attribute holds: ``self.tower[2](x)``.

    Args:
        owner: of the class whose code calls the layers.
        path: of the nn.Sequential from there: its attribute, and its numbers in lists of such.

    Returns:
        False also where the source of the class is not to be had.
    """
    return (path[0], len(path)) in _indexed(owner)  # type: ignore[arg-type]


@functools.cache
def _indexed(owner: type[nn.Module]) -> frozenset[tuple[str, int]]:
    """(attribute, how many indices) of each index in the methods that run with a model's input."""
    found = set()
    for method in _methods(owner):
        for each in ast.walk(method):
            node: Any = each
            depth = 0
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "enumerate":
                node, depth = node.args[0] if node.args else node, 1
            while isinstance(node, ast.Subscript):
                node, depth = node.value, depth + 1
            of_self = isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "self"
            if depth and of_self:
                found.add((node.attr, depth))
    return frozenset(found)


def _methods(owner: type[nn.Module]) -> Iterator[ast.AST]:
    for name, function in own_methods(owner):
        if not _AT_THE_START.fullmatch(name):
            with suppress(OSError, SyntaxError):
                yield ast.parse(textwrap.dedent(inspect.getsource(function)))
