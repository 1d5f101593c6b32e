"""Which modules get maps of one pixel, as the gates of squeeze-and-excitation behind their pooling.

A norm there has no map to normalize over. Where a group is one value, GN returns β whatever the
picture is, and the gate no longer depends on it.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import chain
from types import CodeType

import torch
from torch import Tensor, nn

from gn_det.injection.kinds import Layer, is_conv, is_norm, own_methods, upwards

__all__ = ["gated_modules", "is_gate", "names_used"]

_POOLS = {"adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "max_pool2d", "mean", "amax"}
_GATES = ("sigmoid", "softmax")
# Of the map that a module is tried on: more than one pixel after nine halvings, or, for what takes
# one size alone, after five.
_SIDES = (1024, 224)


def gated_modules(model: nn.Module) -> set[nn.Module]:
    """The modules of a model between a global pooling and the sigmoid or softmax of a gate.

    A module that pools somewhere is copied without its weights and run on one map on the meta
    device, which computes shapes alone. Where it takes something else, as the branches that it
    weighs, who holds it is run. What does not run on one map either tells nothing.
    """
    gated: set[nn.Module] = set()
    found: dict[str, dict[nn.Module, int]] = {}
    for name, unit in model.named_modules():
        if _pools(unit) and _gates(unit):
            for holder in upwards(name):
                if holder not in found:
                    found[holder] = _pixels(model.get_submodule(holder))
                if found[holder]:
                    gated |= {part for part in unit.modules() if found[holder].get(part) == 1}
                    break
    return gated


def is_gate(module: nn.Module) -> bool:
    """Whether a module is a sigmoid or softmax, or calls one."""
    kind = type(module)
    own = any(word in kind.__name__.lower() for word in _GATES)
    return own or any(word in name for name in names_used(kind) for word in _GATES)  # type: ignore[arg-type]


@cache
def names_used(kind: type[nn.Module]) -> frozenset[str]:
    """The functions, methods and attributes that the code of a class names, less PyTorch's own."""
    codes: list[CodeType] = [inspect.unwrap(each).__code__ for _, each in own_methods(kind)]
    for code in codes:
        codes += [part for part in code.co_consts if inspect.iscode(part)]
    return frozenset(chain.from_iterable(code.co_names for code in codes))


def _pools(module: nn.Module) -> bool:
    has_pool = any("pool" in type(child).__name__.lower() for child in module.children())
    return has_pool or not names_used(type(module)).isdisjoint(_POOLS)  # type: ignore[arg-type]


def _gates(unit: nn.Module) -> bool:
    within = (
        part for child in unit.children() if isinstance(child, nn.Sequential) for part in child
    )
    return any(map(is_gate, chain([unit], unit.children(), within)))


def _pixels(unit: nn.Module) -> dict[nn.Module, int]:
    """The most pixels that each convolution and norm of a module gets; empty if it does not run."""
    conv: Layer = next(filter(is_conv, unit.modules()), None)
    if conv is None:
        return {}
    pixels: dict[nn.Module, int] = {}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied = _without_weights(unit)
            for module, twin in _twins(unit, copied):

                def look(_: nn.Module, args: tuple, module: nn.Module = module) -> None:
                    if args and isinstance(args[0], Tensor):
                        seen = args[0].shape[2:].numel()
                        pixels[module] = max(pixels.get(module, 0), seen)

                if is_conv(module) or is_norm(module):
                    twin.register_forward_pre_hook(look)
            copied.eval()
            for side in _SIDES:
                shape = 2, conv.in_channels, *[side] * len(conv.kernel_size)
                pixels.clear()
                # Whatever a class of somebody's own may raise: it takes something else.
                with suppress(Exception):
                    copied(torch.empty(shape, dtype=conv.weight.dtype, device="meta"))
                    return pixels
    except Exception:  # nor can every class be copied
        return {}
    return {}


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy on the meta device without hooks, at no cost of memory."""
    tensors = chain(module.parameters(), module.buffers())
    memo = {
        id(tensor): type(tensor)(torch.empty_like(tensor, device="meta"), False)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for tensor in tensors
    }
    copied = copy.deepcopy(module, memo)
    for part in copied.modules():
        for name, hooks in vars(part).items():
            if name.startswith(("_forward_", "_backward_")) and isinstance(hooks, dict):
                hooks.clear()
    return copied


def _twins(module: nn.Module, copied: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    return zip(module.modules(), copied.modules(), strict=True)
