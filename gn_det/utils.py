"""Two helpers that every layer may use."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["nearest", "write_atomically"]


def nearest(name: str, candidates: Sequence[str]) -> str:
    """``"; did you mean X?"`` for the candidate that resembles name most, or ``""``."""
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or, if this is interrupted, as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)
