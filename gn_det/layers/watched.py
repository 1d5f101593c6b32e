"""Whether modules have to be called one by one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["watched"]


def watched(modules: Iterable[nn.Module]) -> bool:
    """Whether something watches or replaces what modules do: a hook, or a forward of their own."""
    return torch.nn.modules.module._has_any_global_hook() or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        for module in modules
    )
