"""Other packages' GroupNorm, where they are installed, called as group_norm is."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

__all__ = ["PEERS", "installed_peers"]


def _apex(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    layer = importlib.import_module("apex.contrib.group_norm").GroupNorm
    norm = layer(num_groups, x.size(1), device=x.device, dtype=weight.dtype)
    norm.weight, norm.bias = weight, bias
    return norm(x)


def _liger(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
    return function.apply(x, weight, bias, x.size(1), num_groups, 1e-5)


def _torchnorm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor) -> Tensor:
    norm = importlib.import_module("torchnorm").GroupNorm(num_groups, x.size(1)).to(x.device)
    norm.weight, norm.bias = weight, bias
    return norm(x)


PEERS = {"apex": _apex, "Liger": _liger, "torchnorm": _torchnorm}


def installed_peers(arguments: dict[str, Any]) -> dict[str, Callable[..., Tensor]]:
    """The peers that are installed and take these arguments of group_norm, tried on them.

    They know GN alone; the addition and the ReLU are PyTorch's.
    """
    if arguments.get("normalize_residual"):
        return {}
    found = {}
    for name, norm in PEERS.items():

        def function(norm: Callable = norm, **given: Any) -> Tensor:
            y = norm(given["x"], given["num_groups"], given["weight"], given["bias"])
            y = y if given.get("residual") is None else y + given["residual"]
            return F.relu(y) if given["activation"] else y

        try:
            y = function(**arguments)
            y.backward(y.detach(), inputs=[arguments["x"]])
        except Exception:
            continue  # not installed, or not for this layout, dtype or device
        finally:
            arguments["x"].grad = None
        found[name] = function
    return found
