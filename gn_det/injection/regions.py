"""The regions of interest that two models look at: whether they are the same.

Layers behind a RoI pooling get a row for each box. Two models that find their own boxes pair rows
of different boxes, which nothing shows where both find as many.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["Regions"]

_POOLERS = re.compile(r"\w*roi\w*(align|pool|extract)\w*", re.IGNORECASE)


class Regions:
    """The boxes that the RoI poolers of a model get, call by call.

    Attributes:
        others: the name of a pooler that got other boxes than in the run before; empty if none did.
    """

    def __init__(self) -> None:
        self.calls: dict[str, list[list[Tensor]]] = {}
        self.others = ""
        self._within = 0

    @contextmanager
    def recorded(self, model: nn.Module) -> Iterator[None]:
        """Look at the boxes of a run."""
        self.calls, self.others = {}, ""
        with self._seeing(model, self._record):
            yield

    @contextmanager
    def compared(self, model: nn.Module) -> Iterator[None]:
        """Compare the boxes of another run with those of the recorded one."""
        self._count: dict[str, int] = {}
        with self._seeing(model, self._compare):
            yield

    def _record(self, name: str, boxes: list[Tensor]) -> None:
        self.calls.setdefault(name, []).append(boxes)

    def _compare(self, name: str, boxes: list[Tensor]) -> None:
        index = self._count.get(name, 0)
        self._count[name] = index + 1
        calls = self.calls.get(name, [])
        if index < len(calls):
            same = _equal(calls[index], boxes)
            # The stages of a cascade go on from the boxes of the stage before, one for each.
            continued = index > 0 and _number(boxes) == _number(calls[index]) == _number(calls[0])
            if same or continued:
                return
        self.others = self.others or name

    @contextmanager
    def _seeing(self, model: nn.Module, see: Any) -> Iterator[None]:
        self._within = 0

        def enter(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
            if not self._within:
                see(name, [*_tensors((args[1:], kwargs))])
            self._within += 1

        def leave(*_: Any) -> None:
            self._within -= 1

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if _POOLERS.fullmatch(type(module).__name__):
                    hooks.enter_context(
                        module.register_forward_pre_hook(
                            lambda _, args, kwargs, name=name: enter(name, args, kwargs),
                            with_kwargs=True,
                        )
                    )
                    hooks.enter_context(module.register_forward_hook(leave, always_call=True))
            with _Calls(enter, leave):
                yield


class _Calls(TorchFunctionMode):
    """Sees torchvision's RoI operators where no module calls them."""

    def __init__(self, enter: Any, leave: Any) -> None:
        self.enter, self.leave = enter, leave

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if _POOLERS.fullmatch(name):
            self.enter(name, args, kwargs or {})
            self.leave()
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The boxes in arguments: tensors, and what holds one, as Detectron2's Boxes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(getattr(value, "tensor", None), Tensor):
        yield value.tensor


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _number(boxes: list[Tensor]) -> list[int]:
    return [len(each) for each in boxes]
