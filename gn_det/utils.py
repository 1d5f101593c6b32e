"""Helpers that every layer may use."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gn_det.errors import InputError

__all__ = ["make_folder", "nearest", "write_atomically"]


def make_folder(path: Path) -> None:
    """Create a folder with its parents, and check that files can be written there.

    Raises:
        InputError: they cannot.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"folder {path} cannot be written: {error.strerror}") from error


def nearest(name: str, candidates: Sequence[str]) -> str:
    """``"; did you mean X?"`` for the candidate that resembles name most, or ``""``."""
    matches = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else ""


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there whole or, if this is interrupted, as it was."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
