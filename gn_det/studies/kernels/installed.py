"""Other packages' GroupNorm, where they are installed, called as group_norm is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PEERS", "installed_peers"]


def _apex(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    layer = importlib.import_module("apex.contrib.group_norm").GroupNorm
    return _with_parameters(layer(num_groups, x.size(1), device=x.device), weight, bias)


def _liger(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
    return lambda x: function.apply(x, weight, bias, x.size(1), num_groups, 1e-5)


def _torchnorm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor
) -> Callable[[Tensor], Tensor]:
    layer = importlib.import_module("torchnorm").GroupNorm
    return _with_parameters(layer(num_groups, x.size(1)), weight, bias)


def _with_parameters(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    """The layer with these tensors, which a module does not take in place of its own."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        delattr(layer, name)
        setattr(layer, name, tensor)
    return layer


PEERS = {"apex": _apex, "Liger": _liger, "torchnorm": _torchnorm}


def installed_peers(arguments: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """The peers that are installed and take these arguments of group_norm, tried on them.

    They know GN alone; the addition and the ReLU are PyTorch's.
    """
    if arguments.get("normalize_residual"):
        return {}
    found = {}
    wanted = [arguments[name] for name in ("x", "weight", "bias")]
    for name, make in PEERS.items():
        try:
            norm = make(wanted[0], arguments["num_groups"], *wanted[1:])

            def function(norm: Callable = norm, **given: Any) -> Tensor:
                y = norm(given["x"])
                y = y if given.get("residual") is None else y + given["residual"]
                return F.relu(y) if given["activation"] else y

            y = function(**arguments)
            torch.autograd.grad(y, wanted, torch.ones_like(y))
        except Exception:
            continue  # not installed, or not for this layout, dtype or device
        found[name] = function
    return found
