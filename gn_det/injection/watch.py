"""What a forward reads and changes besides tensors, while it is recorded."""

from __future__ import annotations

import builtins
import copy
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from inspect import getattr_static
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

from gn_det.injection.stand_in import UntraceableError, length_of
from gn_det.text import path_of

__all__ = ["AUTOGRAD_FUNCTION", "Watch"]

# What nn.Module itself keeps, besides the mode.
_INTERNAL = vars(nn.Module()).keys() - {"training"}

# Whose backward pass a record of its forward would lose.
AUTOGRAD_FUNCTION = "calls an autograd.Function"

# A record does not show calls of these. A forward that calls one is refused, PyTorch's own apart.
_UNSEEN = {
    "asks torch.is_grad_enabled": (torch, "is_grad_enabled"),
    "asks torch.is_autocast_enabled": (torch, "is_autocast_enabled"),
    "asks torch.is_inference_mode_enabled": (torch, "is_inference_mode_enabled"),
    "asks torch.compiler.is_compiling": (torch.compiler, "is_compiling"),
    "asks torch.onnx.is_in_onnx_export": (torch.onnx, "is_in_onnx_export"),
    "asks for its parameters": (nn.Module, "named_parameters"),
    "asks for its buffers": (nn.Module, "named_buffers"),
    "asks torch.jit.is_tracing": (torch.jit, "is_tracing"),
    "switches autocast": (torch.autocast, "__enter__"),
    "switches gradients off": (torch.no_grad, "__enter__"),
    "switches gradients on": (torch.enable_grad, "__enter__"),
    "switches gradients": (torch.set_grad_enabled, "__init__"),
    "switches to inference": (torch.inference_mode, "__enter__"),
    "switches cuDNN": (torch.backends.cudnn, "flags"),
    "changes what is kept for the backward pass": (
        torch.autograd.graph.saved_tensors_hooks,
        "__enter__",
    ),
    AUTOGRAD_FUNCTION: (torch.autograd.Function, "apply"),
}

# Those of PyTorch that call these on the way to a stand-in.
_PYTORCHS = {
    "torch.fx._symbolic_trace",
    "torch.fx.proxy",
    "torch.fx.node",
    "torch.amp.autocast_mode",
}

_CONTAINERS = (list, dict, set, deque)  # that a forward may change


class Watch:
    """What is read from a module and its parts, and a refusal of what a record does not show.

    Args:
        root: the module.
        paths: of it and of its parts.

    Attributes:
        reads: what the modules hold besides modules and tensors, and was read: by path and name.
    """

    def __init__(self, root: nn.Module, paths: Mapping[nn.Module, str]) -> None:
        self.reads: dict[tuple[str, str], Any] = {}
        self._root, self._paths = root, paths
        self._states: dict[tuple[str, str], tuple[Any, dict[str, Any]]] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Note what this thread reads from modules meanwhile, and let it set nothing."""
        try:
            with ExitStack() as replaced:
                for owner, name, function in [*self._replacements()]:
                    replaced.enter_context(_replaced(owner, name, function))
                yield
        finally:
            changed = [*self._put_back()]
        if changed:
            raise UntraceableError(f"changes {path_of(*changed[0])}")

    def _replacements(self) -> Iterator[tuple[Any, str, Any]]:
        """Yields (owner, name, function) of what takes the place of Python's and PyTorch's."""
        thread, plain = threading.get_ident(), nn.Module.__getattribute__
        set_attribute = nn.Module.__setattr__

        def read(module: nn.Module, name: str) -> Any:
            value = plain(module, name)
            own = name not in _INTERNAL and name in plain(module, "__dict__")
            if own and threading.get_ident() == thread and module in self._paths:
                where = self._paths[module], name
                self.reads.setdefault(where, _copy(value))
                if _has_state(value) and where not in self._states:
                    self._states[where] = value, {k: _copy(v) for k, v in vars(value).items()}
            return value

        def refuse(module: nn.Module, name: str, value: Any) -> None:
            if threading.get_ident() == thread:
                raise UntraceableError(f"sets {name}")
            set_attribute(module, name, value)

        def refused(function: Callable, why: str) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                caller = sys._getframe(1).f_globals.get("__name__", "")
                if threading.get_ident() == thread and caller not in _PYTORCHS:
                    raise UntraceableError(why)
                if of_classes:
                    kind, *args = args
                    return function.__get__(None, kind)(*args, **kwargs)
                return function(*args, **kwargs)

            of_classes = "classmethod" in type(function).__name__
            return classmethod(call) if of_classes else call

        yield builtins, "len", length_of(builtins.len)
        yield nn.Module, "__getattribute__", read
        yield nn.Module, "__setattr__", refuse
        for why, (owner, name) in _UNSEEN.items():
            # torch.backends.cudnn passes on to another module what it does not hold itself.
            if function := getattr_static(owner, name, None) or getattr(owner, name, None):
                yield owner, name, refused(function, why)

    def _put_back(self) -> Iterator[tuple[str, str]]:
        """Undo what was changed meanwhile in lists, dicts and objects, and yield where."""
        for where, value in self.reads.items():
            if self._restored(*where, value):
                yield where
        for where, (value, before) in self._states.items():
            if not _is_as_before(value, before):
                vars(value).update(before)
                yield where

    def _restored(self, path: str, name: str, value: Any) -> bool:
        """Whether a list or a dict was changed meanwhile; it is put back."""
        now = vars(self._root.get_submodule(path))[name]
        if not isinstance(value, _CONTAINERS) or now == value:
            return False
        now.clear()
        (now.extend if isinstance(value, (list, deque)) else now.update)(value)
        return True


@contextmanager
def _replaced(owner: Any, name: str, function: Any) -> Iterator[None]:
    """Another attribute of a module or a class for a time; one that it inherits comes back."""
    own = vars(owner).get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _has_state(value: Any) -> bool:
    """Whether a value is an object that code may change, and neither a module nor a tensor."""
    stateless = (nn.Module, torch.Tensor, type, FunctionType, ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, stateless)


def _is_as_before(value: Any, before: dict[str, Any]) -> bool:
    """Whether the public attributes that an object had are the same; others are caches."""

    def items(each: Any) -> Any:
        return [*map(id, each)] if isinstance(each, _CONTAINERS) else id(each)

    now = vars(value)
    public = {key: each for key, each in before.items() if not key.startswith("_")}
    return all(key in now and items(now[key]) == items(each) for key, each in public.items())


def _copy(value: Any) -> Any:
    return copy.copy(value) if isinstance(value, _CONTAINERS) else value
