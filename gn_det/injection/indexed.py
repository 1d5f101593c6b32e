"""Whether the code of a module takes the layers of an nn.Sequential by their numbers."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from contextlib import suppress

from torch import nn

from gn_det.injection.kinds import own_methods

__all__ = ["takes_by_number"]

Place = tuple[str, int]  # an attribute of self, and how many indices are behind it
Names = dict[str, set[Place]]  # local ones

_LONGEST_CHAIN = 2  # of names that stand for others

_AT_THE_START = re.compile(r"__init__|\w*(init|reset)\w*")  # which runs before a norm comes


def takes_by_number(owner: type[nn.Module], path: list[str]) -> bool:
    """Whether methods of a class index or number what an attribute holds: ``self.tower[2](x)``.

    Local names of it, and lists of it or its children, count as it.

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
    found: set[Place] = set()
    for method in _methods(owner):
        local = _local_names(method)
        for each in ast.walk(method):
            match each:
                case (
                    ast.Subscript(value=holder)
                    | ast.Call(func=ast.Name(id="enumerate"), args=[holder, *_])
                    | ast.Assign(targets=[ast.Tuple() | ast.List()], value=holder)
                ):
                    found |= _one_of(holder, local)
    return frozenset(found)


def _places(node: ast.AST, local: Names) -> set[Place]:
    """What of self an expression may be."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return {(name, 0)}
        case ast.Name(id=name):
            return local.get(name, set())
        case ast.Subscript(value=holder):
            return _one_of(holder, local)
        case (
            ast.Call(func=ast.Name(id="list" | "tuple" | "iter" | "reversed"), args=[holder])
            | ast.Call(func=ast.Attribute(value=holder, attr="children" | "values"))
            | ast.Attribute(value=holder, attr="_modules")
            | ast.NamedExpr(value=holder)
        ):
            return _places(holder, local)
    return set()


def _one_of(holder: ast.AST, local: Names) -> set[Place]:
    return {(name, indices + 1) for name, indices in _places(holder, local)}


def _local_names(method: ast.AST) -> Names:
    """What of self the names in a method stand for, on any of its lines."""
    local: Names = {}
    for _ in range(_LONGEST_CHAIN):
        for each in ast.walk(method):
            match each:
                case (
                    ast.Assign(targets=[ast.Name(id=name), *_], value=value)
                    | ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value)
                    | ast.NamedExpr(target=ast.Name(id=name), value=value)
                ):
                    found = _places(value, local)
                case (
                    ast.For(target=ast.Name(id=name), iter=holder)
                    | ast.comprehension(target=ast.Name(id=name), iter=holder)
                ):
                    found = _one_of(holder, local)
                case _:
                    continue
            local[name] = local.get(name, set()) | found
    return local


def _methods(owner: type[nn.Module]) -> Iterator[ast.AST]:
    for name, function in own_methods(owner):
        if not _AT_THE_START.fullmatch(name):
            with suppress(OSError, SyntaxError):
                yield ast.parse(textwrap.dedent(inspect.getsource(function)))
