"""How a program ends: bad input is one line on stderr and status 2, never a stack trace."""

from __future__ import annotations

import sys
from collections.abc import Callable

from gn_det.errors import InputError

__all__ = ["run_command"]


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
