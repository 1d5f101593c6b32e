"""The settings of a conversion, with which one that was interrupted goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gn_det.errors import InputError
from gn_det.utils import write_atomically

__all__ = ["UNFINISHED", "keep_settings", "seed_in"]

UNFINISHED = "unfinished.json"  # in the folder of a conversion while it lasts


def keep_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Write settings to a file, or check that those in it are the same.

    Raises:
        InputError: they are others, each named with both values.
    """
    if not file.exists():
        write_atomically(file, json.dumps(settings, indent=2) + "\n")
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    others = {key: value for key, value in settings.items() if found.get(key) != value}
    if others:
        there = {key: found.get(key) for key in others}
        for key, now in others.items():  # of a whole config, the lines that differ
            if isinstance(now, str) and isinstance(there[key], str):
                lines = [{*text.splitlines()} for text in (there[key], now)]
                there[key] = "; ".join(sorted(line.strip() for line in lines[0] - lines[1]))
                others[key] = "; ".join(sorted(line.strip() for line in lines[1] - lines[0]))
        raise InputError(
            f"{file.parent} has weights of other settings: {there} there, and {others} now; remove "
            "it, or name another folder"
        )


def seed_in(file: Path) -> int:
    """With which a conversion was begun, for a SEED that is drawn."""
    return json.loads(file.read_text(encoding="utf-8"))["seed"]
