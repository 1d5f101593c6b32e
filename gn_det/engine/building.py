"""What other people's parts make of a config that does not fit them, said in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode

import gn_det
from gn_det.config import settings
from gn_det.errors import InputError

__all__ = ["building"]

_OURS = Path(gn_det.__file__).parent


@contextmanager
def building(what: str, cfg: CfgNode | None = None) -> Iterator[None]:
    """Turn an exception of the parts that are built into an InputError.

    Detectron2, PyTorch and a user's own classes check what a config gives them as they are built,
    often with a bare assertion, so the line that raised is a part of the message. An exception that
    was raised in gn_det's own files is a defect, and passes.

    Args:
        what: is built, the beginning of the message.
        cfg: the config. Where a name is not there, such as that of a feature map, the message has
            the keys that list it.

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
            f"({Path(raised.filename).name}, line {raised.lineno}{line}){_keys_with(error, cfg)}"
        ) from error


def _keys_with(error: Exception, cfg: CfgNode | None) -> str:
    name = next(iter(error.args), None)
    if cfg is None or not isinstance(error, KeyError) or not isinstance(name, str):
        return ""
    keys = [key for key, value in settings(cfg) if isinstance(value, list) and name in value]
    return f"; {name} is in {', '.join(keys)}" if keys else ""
