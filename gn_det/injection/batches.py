"""Batches that a model does not take as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gn_det.errors import InputError
from gn_det.text import reason_of

__all__ = ["running_on"]


@contextmanager
def running_on(batch: Any) -> Iterator[None]:
    """Say of an exception that a model raises on a batch what the batch is, and what to do.

    Raises:
        InputError: in place of what a model raises of inputs that are not its own.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"the model fails on a batch, {_described(batch)}: {reason_of(error)}. batches is a "
            "list of what the model is called on; where that is a part of a batch, give a call, "
            "such as call=lambda model, batch: model(batch[0])"
        ) from error


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a {tuple(batch.shape)} tensor of {str(batch.dtype).removeprefix('torch.')}"
    return f"a {type(batch).__name__}"
