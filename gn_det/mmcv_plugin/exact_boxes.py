"""RoI extractors with boxes in float32, in any precision of the features."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["use_exact_boxes"]

_POOLING = re.compile(r"mmcv\.ops\.\w*roi")


def use_exact_boxes(model: nn.Module) -> None:
    """Let each RoI extractor of mmdetection, and each RoIAlign of mmcv, work in float32, in place.

    mmdetection's extractors round their boxes to the features' dtype, which FusedGroupNorm keeps,
    and mmcv's operators do not take bfloat16. The result has the features' dtype.
    """
    for module in model.modules():
        layers = getattr(module, "roi_layers", None)
        layers = [module, *layers] if isinstance(layers, nn.ModuleList) else [module]
        pools = any(_POOLING.match(type(layer).__module__) for layer in layers)
        if pools and _to_float32 not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_to_float32, with_kwargs=True)
            module.register_forward_hook(_back)


def _to_float32(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    features = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    module._features_dtype = features.dtype
    return tree_map_only(Tensor, _widen, (args, kwargs))


def _widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _back(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.to(module._features_dtype)
