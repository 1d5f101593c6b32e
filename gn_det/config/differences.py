"""The settings in which configs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gn_det.errors import InputError

__all__ = ["check_same", "differences", "format_differences", "settings"]

Differences = dict[str, dict[str, Any]]  # values by key, and by the name of the config


def differences(configs: Mapping[str, Mapping[str, Any]]) -> Differences:
    """The settings in which configs differ, and their value in each, by key and name.

    OUTPUT_DIR is excluded.

    Args:
        configs: by name, each a CfgNode or nested mappings of plain values.
    """
    flat = {name: dict(settings(cfg)) for name, cfg in configs.items()}
    keys = sorted(set().union(*flat.values()))
    return {
        key: {name: values.get(key) for name, values in flat.items()}
        for key in keys
        if len({repr(values.get(key)) for values in flat.values()}) > 1
    }


def check_same(folder: Path, there: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that what a folder holds has the settings that are asked for.

    Args:
        folder: named in the error.
        there: settings with which it was begun.
        now: those asked for.

    Raises:
        InputError: they are others, each named with both values.
    """
    if others := differences({"the run": there, "what is asked for": now}):
        raise InputError(
            f"{folder} holds a run with other settings: {format_differences(others)}. Take the "
            "same ones, name another folder, or remove that one"
        )


def format_differences(found: Differences) -> str:
    """Differences in a line: each key with its value in every config."""
    return "; ".join(
        f"{key} is {', '.join(f'{value!r} in {name}' for name, value in values.items())}"
        for key, values in found.items()
    )


def settings(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the keys of a config with dots, and their values; OUTPUT_DIR is excluded."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        elif prefix + key != "OUTPUT_DIR":
            yield prefix + key, json.loads(json.dumps(value))  # as a file has it, without tuples
