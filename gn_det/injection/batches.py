"""Batches that a model does not take as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gn_det.errors import InputError
from gn_det.text import reason_of

__all__ = ["running_converted", "running_on"]


_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


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
    except _FAILURES as error:
        raise InputError(
            f"the model fails on a batch, {_described(batch)}: {reason_of(error)}. batches is a "
            "list of what the model is called on; where that is a part of a batch, give a call, "
            "such as call=lambda model, batch: model(batch[0])"
        ) from error


@contextmanager
def running_converted() -> Iterator[None]:
    """Say of an exception that a converted model raises, where that with BN raises none, why.

    Raises:
        InputError: in place of what the model raises.
    """
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        raise InputError(
            f"the converted model fails on a batch that the model with BN takes: "
            f"{reason_of(error)}. Where its code asks a norm for what only BN has, name sites "
            "without that norm"
        ) from error


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a {tuple(batch.shape)} tensor of {str(batch.dtype).removeprefix('torch.')}"
    return f"a {type(batch).__name__}"
