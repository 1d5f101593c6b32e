"""What a forward pass keeps for its backward pass, counted on any device and on fake tensors."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["ELSEWHERE", "WEIGHT_COPIES", "autocast", "kept_for_backward"]

ELSEWHERE = "elsewhere"
WEIGHT_COPIES = "weights in low precision"


def kept_for_backward(
    forward: Callable[[], Any],
    parts: Mapping[str, nn.Module] | None = None,
    weights: Iterable[Tensor] = (),
) -> dict[str, int]:
    """Bytes that a forward pass allocates and its autograd graph keeps alive, part by part.

    Every storage counts once and as a whole, whoever keeps it: operators, custom functions, what
    torch.utils.checkpoint stores. What was there before the pass does not count (parameters,
    inputs), nor what outlives the graph (outputs, caches of the model).

    Args:
        forward: runs the pass and returns tensors with a graph, in any nesting. Called once, with
            gradients and autocast as they are set.
        parts: modules by name; a storage belongs to the innermost that ran when it was allocated.
        weights: parameters, whose copies in lower precision are WEIGHT_COPIES. Under autocast the
            graph keeps these, too, as many bytes whatever the norm.

    Returns:
        Bytes by part, in the order in which they first ran; ELSEWHERE what belongs to none.
    """
    ledger = _Ledger(weights)
    with ledger, ledger.following(parts or {}):
        outputs = forward()
    torch.clear_autocast_cache()
    graph = [t.grad_fn for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    del outputs
    gc.collect()
    before = ledger.alive()
    del graph
    gc.collect()
    return {part: size for part, size in (before - ledger.alive()).items() if size}


@contextmanager
def autocast(enabled: bool, dtype: torch.dtype = torch.float16) -> Iterator[None]:
    """torch.autocast("cuda", dtype) for fake tensors, too: it needs no GPU.

    float16 keeps as many bytes as bfloat16, whose fake convolutions are never channels_last without
    a GPU.

    Args:
        enabled: whether operators run in dtype.
        dtype: torch.float16 or torch.bfloat16.
    """
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class _Allocation(NamedTuple):
    storage: StorageWeakRef
    part: str
    num_bytes: int


class _Ledger(TorchDispatchMode):
    """Notes every storage that operators allocate, without keeping it."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._allocations: dict[int, _Allocation] = {}
        self._part = [ELSEWHERE]
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        known = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        copies_weight = func is torch.ops.aten._to_copy.default and known <= self._weights
        part = WEIGHT_COPIES if copies_weight else self._part[-1]
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            # A weak reference keeps the address from being another storage's.
            if storage._cdata not in known and storage._cdata not in self._allocations:
                reference = StorageWeakRef(storage)
                self._allocations[storage._cdata] = _Allocation(reference, part, storage.nbytes())
        return result

    def alive(self) -> Counter[str]:
        """Bytes of the storages that are still there, by part."""
        found: Counter[str] = Counter()
        for storage, part, num_bytes in self._allocations.values():
            found[part] += 0 if storage.expired() else num_bytes
        return found

    @contextmanager
    def following(self, parts: Mapping[str, nn.Module]) -> Iterator[None]:
        """Note with each storage which part is running."""

        def enter(name: str, *_: Any) -> None:
            self._part.append(name)

        def leave(*_: Any) -> None:
            self._part.pop()

        with ExitStack() as hooks:
            for name, module in parts.items():
                for handle in (
                    module.register_forward_pre_hook(partial(enter, name)),
                    module.register_forward_hook(leave, always_call=True),
                ):
                    hooks.callback(handle.remove)
            yield


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, Tensor))
