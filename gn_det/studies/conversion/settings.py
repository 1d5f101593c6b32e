"""The settings of a conversion, with which one that was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_det.config.differences import differences
from gn_det.errors import InputError
from gn_det.utils import read_json, write_atomically

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
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=2) + "\n")
        return
    found = read_json(file, dict)
    others = differences({"there": found, "now": settings})
    if others:
        there, now = (
            {key: values[name] for key, values in others.items()} for name in ("there", "now")
        )
        raise InputError(
            f"{file.parent} has weights of other settings: {there} there, and {now} now; remove "
            "it, or name another folder"
        )


def seed_in(file: Path) -> int:
    """With which a conversion was begun, for a SEED that is drawn."""
    return read_json(file, dict)["seed"]
