"""What follows each norm of a model as it runs: an account in which fuse has no part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gn_det import FusedGroupNorm
from gn_det.layers import FusedGroupNormAct

__all__ = ["called_alone", "followed", "followed_and_called"]

_ATEN = torch.ops.aten
_RELU_OR_ADD = {
    _ATEN.relu.default, _ATEN.relu_.default, _ATEN.add.Tensor, _ATEN.add_.Tensor
}  # fmt: skip


def followed(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[str]:
    """The names of the norms whose result first goes into a ReLU, or an addition of tensors."""
    return followed_and_called(model, run)[0]


def followed_and_called(
    model: nn.Module, run: Callable[[nn.Module], Any]
) -> tuple[set[str], set[str]]:
    """:func:`followed` and :func:`called_alone`, from one run."""
    with torch.no_grad(), _Following(model) as following:
        run(model)
    return following.found, following.called


def called_alone(model: nn.Module, run: Callable[[nn.Module], Any]) -> set[str]:
    """The names of the norms that are called as modules, and so compute nothing else."""
    return followed_and_called(model, run)[1]


class _Following(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.called: set[str] = set()
        self._results: dict[int, tuple[str, Tensor]] = {}
        self._names = {
            module: name
            for name, module in model.named_modules()
            if isinstance(module, FusedGroupNorm) and module.activation is None
        }

    def __enter__(self) -> _Following:
        # Not by hooks, with which blocks run their own forward.
        self._forwards = {kind: kind.forward for kind in (FusedGroupNorm, FusedGroupNormAct)}
        for kind, forward in self._forwards.items():
            kind.forward = self._noted(forward)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for kind, forward in self._forwards.items():
            kind.forward = forward

    def _noted(self, forward: Callable) -> Callable:
        def noted(norm: FusedGroupNorm, x: Tensor) -> Tensor:
            y = forward(norm, x)
            if norm in self._names:
                self.called.add(self._names[norm])
                self._results[y.data_ptr()] = self._names[norm], y
            return y

        return noted

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and function is not _ATEN.detach.default:
                name, _ = self._results.pop(tensor.data_ptr(), (None, None))
                if name and function in _RELU_OR_ADD and len(tree_leaves(args)) <= 2:
                    self.found.add(name)
        return function(*args, **(kwargs or {}))
