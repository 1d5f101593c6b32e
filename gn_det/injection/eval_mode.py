"""Models in eval mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_mode"]


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and afterwards each of their modules into the mode it had.

    What modules cache in eval mode is dropped, such as position biases that are computed once.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model in models:
            model.train()
        for module, mode in modes.items():  # holders come first, and their parts have the last word
            module.train(mode)
        for module, mode in modes.items():
            module.training = mode
