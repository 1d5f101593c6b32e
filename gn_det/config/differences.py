"""The settings in which configs differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__all__ = ["differences"]


def differences(configs: Mapping[str, CfgNode]) -> dict[str, dict[str, Any]]:
    """The settings in which configs differ, and their value in each, by key and name.

    OUTPUT_DIR is excluded.
    """
    flat = {name: dict(_settings(cfg)) for name, cfg in configs.items()}
    keys = sorted(set().union(*flat.values()))
    return {
        key: {name: settings.get(key) for name, settings in flat.items()}
        for key in keys
        if len({repr(settings.get(key)) for settings in flat.values()}) > 1
    }


def _settings(cfg: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields keys with dots, and their values."""
    for key, value in cfg.items():
        if isinstance(value, type(cfg)):
            yield from _settings(value, f"{prefix}{key}.")
        elif prefix + key != "OUTPUT_DIR":
            yield prefix + key, json.loads(json.dumps(value))  # as a file has it, without tuples
