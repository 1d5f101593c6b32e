"""Recomputation: what can be computed again cheaply is not kept for the backward pass.

Inside :func:`recomputation`, a result of :func:`recomputed` carries its recipe: the function, and
the inputs it came from. Whatever operator then saves that tensor for its backward pass, of
whichever module, saves the recipe in its place, and the backward pass follows it. Results whose
inputs are kept anyway (a norm's, whose own backward needs its input) so cost no memory.

torch.utils.checkpoint instead runs a region of the model a second time, and keeps the region's
results: a tensor that leaves it, such as FPN's levels on their way to the RPN, stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from gn_det.ops.backend import under_transform

__all__ = ["recomputation", "recompute_in", "recomputed", "recomputes_in", "stop_recomputing_in"]


class _Current(threading.local):
    """What each thread is at; a GPU's backward passes run in threads that never enter."""

    def __init__(self) -> None:
        self.recipes: dict[int, _Recipe] | None = None
        self.inside: list[_Saved] | None = None
        self.entered: list[tuple[nn.Module, AbstractContextManager]] = []  # from the outermost


_current = _Current()


def recompute_in(module: nn.Module) -> None:
    """Let a module's forward pass in training run inside :func:`recomputation`, and its copies'."""
    if not recomputes_in(module):
        module.register_forward_pre_hook(_enter)
        module.register_forward_hook(_leave, always_call=True)


def recomputes_in(module: nn.Module) -> bool:
    """Whether :func:`recompute_in` was called on a module."""
    return _enter in module._forward_pre_hooks.values()


def stop_recomputing_in(module: nn.Module) -> None:
    """Undo :func:`recompute_in`."""
    for hooks, ours in ((module._forward_pre_hooks, _enter), (module._forward_hooks, _leave)):
        for number in [number for number, hook in hooks.items() if hook is ours]:
            del hooks[number]
            if ours is _leave:
                del module._forward_hooks_always_called[number]


def _enter(module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling() or under_transform():
        return
    entered = _current.entered
    while any(running is module for running, _ in entered):  # Ctrl-C, which calls no hook
        entered.pop()[1].__exit__(None, None, None)
    if module.training and torch.is_grad_enabled():
        context = recomputation()
        context.__enter__()
        entered.append((module, context))


def _leave(module: nn.Module, inputs: Any, output: Any) -> None:
    entered = [] if torch.compiler.is_compiling() else _current.entered
    if entered and entered[-1][0] is module:
        entered.pop()[1].__exit__(None, None, None)


@contextmanager
def recomputation() -> Iterator[None]:
    """Save recipes in place of the results of :func:`recomputed` while the context lasts.

    Inside another, it is part of that. Other torch.autograd.graph.saved_tensors_hooks around it
    see nothing of what is saved inside; those inside, as of torch.utils.checkpoint, come first.
    """
    if _current.recipes is not None:
        yield
        return
    _current.recipes, _current.inside = {}, None
    try:
        with saved_tensors_hooks(_save, _restored):
            yield
    finally:
        _current.recipes = None


def recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """``function(*inputs)``, to be computed again rather than kept, inside :func:`recomputation`.

    Args:
        function: deterministic; its parameters are reached through it, and need no gradient from
            the second time: that goes through the first.
        inputs: tensors, which are kept or have recipes themselves, and anything else.

    Returns:
        What function returns, a tensor in memory of its own.
    """
    if torch.compiler.is_compiling() or _current.recipes is None:
        return function(*inputs)
    _current.inside = inside = []
    try:
        result = function(*inputs)
    finally:
        _current.inside = None
    if result.requires_grad:
        recipe = _Recipe(function, inputs, result)
        _current.recipes[recipe.storage.cdata] = recipe
        for saved in inside:  # by the function itself, as ATen's ReLU does its result
            saved.reconsider()
    return result


class _Recipe:
    """How a tensor is computed again, with what it takes.

    Attributes:
        storage: of the tensor; the reference keeps its address from being another's.
        version: of the tensor, as counted by PyTorch: changed in place, it is another.
        uses: operators that saved the tensor and have not asked for it yet.
    """

    __slots__ = (
        *("storage", "version", "dtype", "uses"),
        *("_function", "_inputs", "_device_type", "_autocast", "_value"),
    )

    def __init__(self, function: Callable, inputs: tuple, result: Tensor) -> None:
        self.storage = StorageWeakRef(result.untyped_storage())
        self.version = result._version
        self.dtype = result.dtype
        self.uses = 0
        self._function = function
        self._inputs = [_Saved(i) if isinstance(i, Tensor) else i for i in inputs]
        self._device_type = result.device.type
        self._autocast = _autocast(self._device_type)
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """The tensor, computed once for all uses that are left."""
        value = self._value
        if value is None:
            inputs = [i.tensor() if isinstance(i, _Saved) else i for i in self._inputs]
            with torch.no_grad(), self._same_autocast():
                value = self._function(*inputs)
        self._value = value if self.uses > 0 else None
        return value

    def _same_autocast(self) -> AbstractContextManager:
        if _autocast(self._device_type) == self._autocast:
            return nullcontext()
        enabled = self._autocast is not None
        return torch.autocast(self._device_type, self._autocast, enabled=enabled)


def _autocast(device_type: str) -> torch.dtype | None:
    """The dtype of autocast on a device, None where it is off or there is none."""
    if not torch.amp.is_autocast_available(device_type):
        return None
    if not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


class _Saved:
    """A tensor for later: itself, or a view of what a recipe gives."""

    __slots__ = ("_for_backward", "_recipe", "_tensor", "_version", "_view")

    def __init__(self, tensor: Tensor, for_backward: bool = False) -> None:
        self._tensor: Tensor | None = tensor.detach()
        self._version = tensor._version
        self._for_backward = for_backward
        self._recipe: _Recipe | None = None
        self.reconsider()

    def reconsider(self) -> None:
        """Give up the tensor where there is a recipe for it."""
        tensor = self._tensor
        recipes = _current.recipes
        if tensor is None or tensor.layout != torch.strided or recipes is None:
            return
        recipe = recipes.get(tensor.untyped_storage()._cdata)
        if recipe and (recipe.version, recipe.dtype) == (tensor._version, tensor.dtype):
            self._view = tensor.size(), tensor.stride(), tensor.storage_offset()
            self._tensor, self._recipe = None, recipe
            recipe.uses += self._for_backward

    def tensor(self) -> Tensor:
        if self._recipe is not None:
            return self._recipe.value().as_strided(*self._view)
        return _unchanged(self._tensor, self._version)

    def restored(self) -> Tensor:
        """The tensor, for the operator that saved it."""
        if self._recipe is not None:
            self._recipe.uses = max(0, self._recipe.uses - 1)  # below 0 with retain_graph
        return self.tensor()


def _save(tensor: Tensor) -> Any:
    """What is kept of a tensor that an operator saves: most have no recipe and never will."""
    if type(tensor) is nn.Parameter:
        return tensor, tensor._version
    if _current.inside is None and tensor.layout == torch.strided:
        recipes = _current.recipes
        if not recipes or tensor.untyped_storage()._cdata not in recipes:
            return tensor.detach(), tensor._version  # an output would keep itself alive
    saved = _Saved(tensor, for_backward=True)
    if _current.inside is not None:
        _current.inside.append(saved)
    return saved


def _restored(saved: Any) -> Tensor:
    return saved.restored() if isinstance(saved, _Saved) else _unchanged(*saved)


def _unchanged(tensor: Tensor, version: int) -> Tensor:
    """PyTorch's own check, which it leaves to those who save in its place."""
    if tensor._version != version:
        raise RuntimeError(
            f"a tensor {tuple(tensor.shape)} that is needed for a gradient was changed "
            f"in place: it is at version {tensor._version}, expected {version}"
        )
    return tensor
