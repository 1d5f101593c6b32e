"""What reaches the terminal and the log: nothing in it can steer a terminal.

Names in files can hold escape sequences and marks that turn the direction of writing. Errors and
tables show them as escapes already; here is what anybody else prints, Detectron2 and Python's
tracebacks included.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any, TextIO

from gn_det.text import printable

__all__ = ["PrintableFilter", "PrintableStream", "discard"]

_COLOUR = re.compile(r"(\x1b\[[\d;]*m)")
_CURSOR_UP = "\x1b[A"  # by which tqdm draws one bar below another


class PrintableStream:
    """A stream in front of another, whose escape sequences it shows instead of sending them.

    Line breaks, tabs and the beginning of the line stay; colours do on a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        if text != _CURSOR_UP and not text.isprintable():
            parts = _COLOUR.split(text) if self._stream.isatty() else [text]
            parts[::2] = [printable(part, keep="\n\r\t") for part in parts[::2]]
            text = "".join(parts)
        self._stream.write(text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class PrintableFilter(logging.Filter):
    """Takes colours out of log records, and shows other escape sequences; line breaks stay."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _lines(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            record.exc_text = _lines(logging.Formatter().formatException(record.exc_info))
        return True


def discard(stream: TextIO) -> None:
    """Let what is written to a stream from now on go nowhere, also when it is closed."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _lines(text: str) -> str:
    return printable(_COLOUR.sub("", text), keep="\n\t")
