"""Stand-ins for tensors, for torch.fx: they refuse what a record of a forward would not show."""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import operator
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from types import FrameType
from typing import Any

import torch
from torch import fx

__all__ = ["StandIn", "UntraceableError", "check_code", "length_of"]


class UntraceableError(BaseException):
    """Why a module's forward cannot be recorded; the message goes on from "its forward".

    It is no Exception, so that no handler in the forward takes it for one of its own.
    """


_ASKS_TYPE = "asks what type an input or a result has"


class StandIn(fx.Proxy):
    """A stand-in for a tensor, or for whatever an input or a part's result is."""

    @property
    def __class__(self) -> type:
        if _of_others(sys._getframe(1)) & {"isinstance", "type"}:
            raise UntraceableError(_ASKS_TYPE)
        return StandIn

    def __getattr__(self, name: str) -> Any:
        if not hasattr(torch.Tensor, name) and _may_go_without(sys._getframe(1)):
            raise UntraceableError(f"asks whether an input or a result has {name}")
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node"):
            raise UntraceableError(f"sets {name} of an input or a result")
        super().__setattr__(name, value)

    def __bool__(self) -> bool:
        if (test := _asserted(sys._getframe(1))) is None:
            return super().__bool__()
        self.tracer.create_proxy("call_function", torch._assert, (self, test), {})
        return True

    def __index__(self) -> int:
        raise UntraceableError("counts by the values of tensors, or how many there are")

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def check_code(forward: Callable) -> None:
    """Refuse what shows in the code of a forward alone."""
    if getattr(forward, "_torchdynamo_disable", False):
        raise UntraceableError("is kept from torch.compile")
    code = getattr(inspect.unwrap(forward), "__code__", None)
    inputs = code.co_varnames[1 : code.co_argcount] if code is not None else ()
    for one, then in pairwise(dis.get_instructions(code) if code is not None else ()):
        if one.opname == "LOAD_GLOBAL" and one.argval == "type" and then.argval in inputs:
            raise UntraceableError(_ASKS_TYPE)


def length_of(count: Callable) -> Callable:
    """Len that also takes stand-ins."""

    def length(sized: Any) -> Any:
        if type(sized) is StandIn:
            return sized.tracer.create_proxy("call_function", count, (sized,), {})
        return count(sized)

    return length


def _of_others(frame: FrameType) -> set[str]:
    """The names in a frame's code; PyTorch's own asks as well, and takes a stand-in as it is."""
    ours = frame.f_globals.get("__name__", "").startswith(("torch.fx", "torch.overrides"))
    return set() if ours else {*frame.f_code.co_names}


def _may_go_without(frame: FrameType) -> bool:
    """Whether a frame asks for an attribute by hasattr or getattr, or where it may be missing."""
    calls = dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith(("CALL", "PRECALL"))
    names = _of_others(frame)
    return bool(names & {"AttributeError", "Exception"}) or (
        calls and bool(names & {"hasattr", "getattr"})
    )


def _asserted(frame: FrameType) -> str | None:
    """What a frame is about to assert, where each of its parts has to hold; None if nothing."""
    for line, end, test in _assertions(frame.f_code.co_filename):
        if line <= frame.f_lineno <= end:
            return test
    return None


@cache
def _assertions(filename: str) -> list[tuple[int, int, str]]:
    """First and last line of assertions in a file, and what they assert."""
    try:
        tree = ast.parse("".join(linecache.getlines(filename)))
    except SyntaxError:
        return []
    return [
        (node.lineno, node.end_lineno or node.lineno, ast.unparse(node.test))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert) and all(map(_holds_whole, ast.walk(node.test)))
    ]


# In an assertion: where the whole holds, so does each condition in it. Not so for `or`, nor where
# Python compares one after the other, as in `x.dim() in (3, 4)`.
_CONJUNCTIONS = (
    ast.And, ast.BoolOp, ast.Compare, ast.Eq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.BinOp, ast.operator, ast.UnaryOp, ast.USub, ast.Subscript, ast.Slice,
    ast.Attribute, ast.Name, ast.Constant, ast.Load,
)  # fmt: skip
_SIZES = {"len", "size", "dim", "ndimension", "numel"}


def _holds_whole(node: ast.AST) -> bool:
    """Whether all conditions of an assertion hold where it does, by a part of it."""
    if isinstance(node, ast.Call):
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in _SIZES
    return isinstance(node, _CONJUNCTIONS)


_IN_PLACE = (
    "__iadd__ __isub__ __imul__ __imatmul__ __itruediv__ __ifloordiv__ __imod__ __ipow__ "
    "__iand__ __ior__ __ixor__ __ilshift__ __irshift__"
)


def _in_place(name: str) -> Callable[[StandIn, Any], fx.Proxy]:
    function = getattr(operator, name)

    def record_it(self: StandIn, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record_it


for _name in _IN_PLACE.split():  # fx has no stand-in for these: they would become y = y + x
    setattr(StandIn, _name, _in_place(_name))
