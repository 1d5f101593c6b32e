"""The command line of the training programs: Detectron2's flags, and COCO-format folders."""

from __future__ import annotations

import argparse

from detectron2.engine import default_argument_parser

__all__ = ["argument_parser"]


def argument_parser(description: str, overrides: str) -> argparse.ArgumentParser:
    """Detectron2's argument parser with --train, --val and --skip-bad-images.

    Args:
        description: first line of --help.
        overrides: form of the config overrides at the end of the command.
    """
    parser = default_argument_parser(
        epilog=f"The flags come first, then config overrides as {overrides}."
    )
    parser.description = description
    for flag, split in (("--train", "training"), ("--val", "held-out")):
        parser.add_argument(
            flag,
            nargs=2,
            metavar=("JSON", "IMAGES_DIR"),
            help=f"{split} split in COCO format; the classes come from its categories",
        )
    parser.add_argument(
        "--skip-bad-images",
        action="store_true",
        help="go on without images of --train and --val that are missing or broken",
    )
    return parser
