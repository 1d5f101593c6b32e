"""Command-line arguments of the programs that train classifiers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch

from gn_det.classification.networks import NETWORKS, NORMS
from gn_det.classification.training import SCHEDULES, ClassifierRecipe
from gn_det.engine.command import at_least

__all__ = ["CPU", "add_device_argument", "add_recipe_arguments", "default_device", "recipe_of"]

CPU = "--device cpu"  # how to choose it, for errors of a GPU that is not there

_OPTIONS: dict[str, dict[str, Any]] = {
    "data": {
        "help": "digits, generated, or a folder: of classes in train/ and val/, or with "
        "train.json, val.json and images/ in COCO format"
    },
    "network": {"choices": NETWORKS},
    "norm": {"choices": NORMS},
    "num_groups": {"type": int, "help": "of GN (default: 32)"},
    "channels_per_group": {"type": int, "help": "of GN, in place of --num-groups"},
    "size": {
        "type": int,
        "help": "side of the images (default: 8 of digits, 224 of folders of classes, else 48)",
    },
    "max_objects": {
        "type": int,
        "metavar": "N",
        "help": "of each split of a folder in COCO format, drawn by chance (default: all)",
    },
    "epochs": {"type": int},
    "ims_per_gpu": {"type": int, "help": "images a process has in a step"},
    "lr": {"type": float, "help": "at 32 images a process, in proportion for others"},
    "schedule": {"choices": SCHEDULES, "help": "of the learning rate: steps ÷10, or cosine"},
    "amp": {"action": "store_true", "help": "mixed precision"},
    "seed": {"type": int},
}


def add_recipe_arguments(
    parser: argparse.ArgumentParser,
    varied: Sequence[str] = (),
    *,
    required: bool = True,
    **defaults: Any,
) -> None:
    """Add a flag for each field of ClassifierRecipe, and --device and --num-workers.

    Args:
        parser: to add to.
        varied: fields that the program varies, which get no flag.
        required: whether fields without a default have to be given.
        defaults: of fields, in place of the recipe's.
    """
    for field in fields(ClassifierRecipe):
        if field.name in varied:
            continue
        options = dict(_OPTIONS[field.name])
        default = defaults.get(field.name, field.default)
        if default is MISSING:
            options["required"] = required
        elif default is not None and default is not False:
            options["default"] = default
            options["help"] = f"{options.get('help', '')} (default: {default})".lstrip()
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    add_device_argument(parser)
    parser.add_argument("--num-workers", **at_least(0, 256), default=0, help="loading processes")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device, by default a GPU where there is one."""
    parser.add_argument("--device", default=default_device(), help="default: %(default)s")


def default_device() -> str:
    """A GPU where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def recipe_of(args: argparse.Namespace, **varied: Any) -> ClassifierRecipe:
    """The recipe of parsed arguments, and of what the program varies."""
    given = {f.name: getattr(args, f.name) for f in fields(ClassifierRecipe) if f.name in args}
    return ClassifierRecipe(**{**given, **varied})
