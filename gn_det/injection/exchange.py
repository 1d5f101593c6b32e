"""Modules in the place of others, wherever a model holds these: its Python may do so as well."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from gn_det.errors import InputError
from gn_det.text import path_of

__all__ = ["check_exchangeable", "exchange"]

# What nn.Module itself keeps: children, parameters and hooks.
_INTERNAL = vars(nn.Module()).keys()


def check_exchangeable(model: nn.Module, modules: Set[nn.Module]) -> None:
    """Check that no function that a model holds is a method of some modules, or encloses them.

    Raises:
        InputError: one is or does, which :func:`exchange` could not change.
    """
    for path, holder in model.named_modules():
        for name, value in _attributes(holder) if holder not in modules else ():
            for held in _in_functions(value, set()):
                if isinstance(held, nn.Module) and held in modules:
                    raise InputError(
                        f"{path_of(path, name)} is a function that has a {type(held).__name__} for "
                        f"itself, and would go on calling it; let {type(holder).__name__} call its "
                        "layer, or name sites without it"
                    )


def exchange(model: nn.Module, others: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others.

    Also where a module has them as attributes, in lists, tuples, dicts, deques and partials: layers
    that add_module has registered are often called from a list.

    Args:
        model: that holds the modules. It is modified in place.
        others: what takes the place of each.
    """
    seen: set[int] = set()
    for holder in [*model.modules()]:
        for name, child in [*holder._modules.items()]:
            if child is not None and child in others:
                setattr(holder, name, others[child])
        for name, value in _attributes(holder):
            vars(holder)[name] = _exchanged(value, others, seen)


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in vars(module).items() if name not in _INTERNAL]


def _in_functions(value: Any, seen: set[int]) -> Iterator[Any]:
    """What methods are of and functions have in their closures, those in lists and the like too."""
    if isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # it is empty
                held = cell.cell_contents
                yield held.__self__ if isinstance(held, MethodType) else held
    elif isinstance(value, partial):
        yield from _in_functions(value.func, seen)
    elif isinstance(value, (list, tuple, dict, deque)) and id(value) not in seen:
        seen.add(id(value))  # it may hold itself
        for item in value.values() if isinstance(value, dict) else value:
            yield from _in_functions(item, seen)


def _exchanged(value: Any, others: Mapping[nn.Module, nn.Module], seen: set[int]) -> Any:
    """A value with the modules in it exchanged: lists and the like in place, others anew."""
    if isinstance(value, nn.Module):
        return others.get(value, value)
    if isinstance(value, partial):
        function = _exchanged(value.func, others, seen)
        arguments = _exchanged(value.args, others, seen)
        _exchanged(value.keywords, others, seen)
        if function is value.func and arguments is value.args:
            return value
        return partial(function, *arguments, **value.keywords)
    if isinstance(value, tuple):
        items = [_exchanged(item, others, seen) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, (list, dict, deque)) and id(value) not in seen:
        seen.add(id(value))  # it may hold itself
        for key, item in [*(value.items() if isinstance(value, dict) else enumerate(value))]:
            if (new := _exchanged(item, others, seen)) is not item:
                value[key] = new
    return value
