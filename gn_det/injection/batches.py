"""Batches that a model does not take as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from gn_det.errors import InputError
from gn_det.text import reason_of

__all__ = ["running_converted", "running_on"]


def running_on(batch: Any) -> AbstractContextManager[None]:
    """Say of an exception that a model raises on a batch what the batch is, and what to do.

    Raises:
        InputError: in place of what a model raises of inputs that are not its own.
    """
    return _telling(
        lambda reason: (
            f"the model fails on a batch, {_described(batch)}: {reason}. batches is a list of what "
            "the model is called on; where that is a part of a batch, give a call, such as "
            "call=lambda model, batch: model(batch[0])"
        )
    )


def running_converted() -> AbstractContextManager[None]:
    """Say of an exception that a converted model raises, where that with BN raises none, why.

    Raises:
        InputError: in place of what the model raises.
    """
    return _telling(
        lambda reason: (
            f"the converted model fails on a batch that the model with BN takes: {reason}. Where "
            "its code asks a norm for what only BN has, name sites without that norm"
        )
    )


@contextmanager
def _telling(say: Callable[[str], str]) -> Iterator[None]:
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(say(reason_of(error))) from error


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a {tuple(batch.shape)} tensor of {str(batch.dtype).removeprefix('torch.')}"
    return f"a {type(batch).__name__}"
