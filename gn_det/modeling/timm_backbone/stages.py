"""The stages of a model of timm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.modeling.timm_backbone.names import flat_name

__all__ = ["first_stages", "parameters_behind"]

# Levels that timm's HRNet names by what is no module of it.
_MODULES_OF_LEVELS = {"stem": "act2", "stage1": "layer1"}


def first_stages(
    name: str, body: Any, freeze_at: int, features: Mapping[int, Tensor]
) -> list[nn.Module]:
    """Modules up to stage freeze_at, which ends at the feature map of stride 2^freeze_at.

    Args:
        name: of the model.
        body: it.
        freeze_at: the stage; 0 for none.
        features: maps by stride, with the graph that leads to them.
    """
    if freeze_at <= 0:
        return []
    modules = [*body.modules()]  # in the order in which they run
    names = [flat_name(key) for key, _ in body.named_modules()]
    info = body.feature_info
    levels = {level["module"].replace(".", "_"): level["reduction"] for level in info.info}
    levels = dict(list(levels.items())[: max(info.out_indices) + 1])  # the model ends there
    levels = {k if k in names else _MODULES_OF_LEVELS.get(k, k): s for k, s in levels.items()}
    last = 2**freeze_at
    inside = [key for key, stride in levels.items() if stride <= last]
    if len(inside) == len(levels):
        return modules
    if not levels.keys() <= {*names}:
        behind = parameters_behind(y for stride, y in features.items() if stride <= last)
        if not behind:
            raise InputError(
                f"MODEL.BACKBONE.FREEZE_AT (freeze_at) {freeze_at}: timm does not tell where this "
                f"stage of {name} ends; set 0, or at least {int(math.log2(min(features)))}"
            )
        return [m for m in modules if behind & {*m.parameters(recurse=False)}]
    if not inside:  # the stem leads to the first map, whose stride is larger
        return modules[: names.index(next(iter(levels)))]
    end = max(i for i, key in enumerate(names) if f"{key}_".startswith(f"{inside[-1]}_"))
    return modules[: end + 1]


def parameters_behind(tensors: Iterable[Tensor]) -> set[Tensor]:
    """The parameters that tensors come from."""
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, found = {*nodes}, set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(node.variable)
        before = {function for function, _ in node.next_functions if function is not None} - seen
        seen |= before
        nodes += before
    return found
