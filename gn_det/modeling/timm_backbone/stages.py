"""The stages of a model of timm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.injection.eval_mode import eval_mode
from gn_det.modeling.timm_backbone.names import flat_name

__all__ = ["first_stages", "parameters_behind"]

# Levels that timm's HRNet names by what is no module of it.
_MODULES_OF_LEVELS = {"stem": "act2", "stage1": "layer1"}


def first_stages(
    name: str, body: Any, freeze_at: int, picture: Tensor, features: Mapping[int, Tensor]
) -> list[nn.Module]:
    """Modules up to stage freeze_at, which ends at the feature map of stride 2^freeze_at.

    Args:
        name: of the model.
        body: it.
        freeze_at: the stage; 0 for none.
        picture: that it takes.
        features: maps of the picture by stride, with the graph that leads to them.

    Raises:
        InputError: the model does not tell where the stage ends.
    """
    if freeze_at <= 0:
        return []
    last, levels = 2**freeze_at, _levels(body)
    if last >= max(features):
        return [*body.modules()]
    behind = _behind(body, last, features)
    ends = last in features and not _from_later_stages(body, last, levels, behind)
    found = behind if ends else _by_order(body, last, levels, picture) or behind
    if not any(True for module in found for _ in module.parameters(recurse=False)):
        raise InputError(
            f"MODEL.BACKBONE.FREEZE_AT (freeze_at) {freeze_at}: timm does not tell where this "
            f"stage of {name} ends; set 0, or at least {int(math.log2(min(features)))}"
        )
    return found


def _levels(body: Any) -> dict[str, int]:
    """Strides by the module at whose end a level is, up to the last level that is returned."""
    names = {flat_name(key) for key, _ in body.named_modules()}
    info = body.feature_info
    levels = [(level["module"].replace(".", "_"), level["reduction"]) for level in info.info]
    return {
        key if key in names else _MODULES_OF_LEVELS.get(key, key): stride
        for key, stride in levels[: max(info.out_indices) + 1]
        if key  # TResNet's stem has no name
    }


def _behind(body: nn.Module, last: int, features: Mapping[int, Tensor]) -> list[nn.Module]:
    """Modules that the maps up to stride last come from."""
    behind = parameters_behind(y for stride, y in features.items() if stride <= last)
    return [m for m in body.modules() if behind & {*m.parameters(recurse=False)}]


def _from_later_stages(
    body: nn.Module, last: int, levels: Mapping[str, int], behind: Sequence[nn.Module]
) -> bool:
    """Whether maps up to stride last come from later stages as well, as all of HRNet's do."""
    later = [f"{key}_" for key, stride in levels.items() if stride > last]
    names = {module: f"{flat_name(key)}_" for key, module in body.named_modules()}
    return any(names[module].startswith(key) for module in behind for key in later)


def _by_order(
    body: nn.Module, last: int, levels: Mapping[str, int], picture: Tensor
) -> list[nn.Module]:
    """Modules up to the end of the level of stride last, as they are registered; or none.

    The stem leads to the first level, or ends with what gives maps of stride 2.
    """
    modules, names = [*body.modules()], [flat_name(key) for key, _ in body.named_modules()]
    if not levels.keys() <= {*names}:
        return []
    inside = [key for key, stride in levels.items() if stride <= last]
    if not inside:
        return modules[: names.index(next(iter(levels)))]
    end = max(i for i, key in enumerate(names) if f"{key}_".startswith(f"{inside[-1]}_"))
    found = modules[: end + 1]
    return found + _of_stride_2(body, picture) if last == 2 else found


@torch.no_grad()
def _of_stride_2(body: nn.Module, picture: Tensor) -> list[nn.Module]:
    """The first parts of a model, in the order in which they run, up to the last of stride 2."""
    ran: list[tuple[nn.Module, int]] = []

    def note(part: nn.Module, inputs: Any, output: Any) -> None:
        is_map = isinstance(output, Tensor) and output.dim() == 4
        ran.append((part, output.shape[2] if is_map else 0))

    with ExitStack() as hooks, eval_mode(body):
        for part in body.children():
            hooks.enter_context(part.register_forward_hook(note))
        body(picture)
    large = takewhile(lambda each: 2 * each[1] >= picture.shape[2], ran)
    return [module for part, _ in large for module in part.modules()]


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
