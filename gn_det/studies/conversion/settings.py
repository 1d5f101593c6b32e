"""The settings of a conversion, with which one that was interrupted goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_det.config.differences import check_same
from gn_det.files import read_json, write_json

__all__ = ["UNFINISHED", "keep_settings", "seed_in"]

UNFINISHED = "unfinished.json"  # in the folder of a conversion while it lasts


def keep_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Write settings to a file, or check that those in it are the same.

    Args:
        file: JSON.
        settings: plain values, or nested mappings of such, as a config is.

    Raises:
        InputError: they are others, each named with both values.
    """
    if file.exists():
        check_same(file.parent, read_json(file, dict), settings)
    else:
        write_json(file, settings)


def seed_in(file: Path) -> int:
    """With which a conversion was begun, for a SEED that is drawn."""
    return read_json(file, dict)["seed"]
