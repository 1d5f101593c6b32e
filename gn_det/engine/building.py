"""What other people's parts make of a config that does not fit them, said in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gn_det
from gn_det.errors import InputError

__all__ = ["building"]

_OURS = Path(gn_det.__file__).parent


@contextmanager
def building(what: str) -> Iterator[None]:
    """Turn an exception of the parts that are built into an InputError.

    Detectron2, PyTorch and a user's own classes check what a config gives them as they are built,
    often with a bare assertion, so the line that raised is a part of the message. An exception that
    was raised in gn_det's own files is a defect, and passes.

    Args:
        what: is built, the beginning of the message.

    Raises:
        InputError: with what, the exception and where it was raised.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raised = traceback.extract_tb(error.__traceback__)[-1]
        if Path(raised.filename).is_relative_to(_OURS):
            raise
        # A bare assertion says nothing, and a key's name not much; the line says what was expected.
        says_itself = str(error) and not isinstance(error, KeyError)
        line = "" if says_itself else f": {raised.line}"
        reason = " ".join([type(error).__name__, *str(error).split()])
        raise InputError(
            f"{what} cannot be built as the config says: {reason} "
            f"({Path(raised.filename).name}, line {raised.lineno}{line})"
        ) from error
