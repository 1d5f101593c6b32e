"""The command line of a program, and how it ends: bad input is one line and status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from detectron2.engine import default_argument_parser

from gn_det.errors import InputError

__all__ = ["argument_parser", "run_command"]


def run_command(main: Callable[[], int | None]) -> None:
    """Call main and exit with its status (None is 0), 2 for an InputError, 130 for Ctrl-C."""
    try:
        status = main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


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
