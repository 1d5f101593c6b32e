"""Where metrics go: Detectron2's writers, and a console line of where the time went."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from typing import Any

from detectron2.engine import default_writers
from detectron2.utils.events import EventWriter, get_event_storage

from gn_det.text import reason_of

__all__ = ["build_writers"]


def build_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's default writers, and a console line of the shares of time and peak memory."""
    threading.excepthook = _without_traces_of_disks
    printer, *files = default_writers(output_dir, max_iter)
    return [printer, *map(_UntilItFails, files), _SharePrinter(max_iter)]


def _without_traces_of_disks(args: threading.ExceptHookArgs) -> None:
    """What TensorBoard's thread cannot write, it raises anew at the next write, which says it."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)


class _UntilItFails(EventWriter):
    """A writer of a file, without which a run goes on where that cannot be written."""

    def __init__(self, writer: EventWriter) -> None:
        self._writer: EventWriter | None = writer

    def write(self, **kwargs: Any) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write(**kwargs)
        except OSError as error:
            logging.getLogger(__name__).warning(
                f"{type(self._writer).__name__} cannot write ({reason_of(error)}): the training "
                "goes on without it"
            )
            self.close()
            self._writer = None

    def close(self) -> None:
        with suppress(OSError):  # of what could not be written before
            if self._writer is not None:
                self._writer.close()


class _SharePrinter(EventWriter):
    """Prints the metrics share/* and peak_memory_mb, medians of a window."""

    def __init__(self, max_iter: int, window_size: int = 20) -> None:
        self._max_iter = max_iter
        self._window_size = window_size

    def write(self) -> None:
        storage = get_event_storage()
        shares = {
            name.removeprefix("share/"): history.median(self._window_size)
            for name, history in storage.histories().items()
            if name.startswith("share/")
        }
        if not shares or storage.iter == self._max_iter:  # nothing new after the last step
            return
        parts = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        peak = storage.history("peak_memory_mb").latest()
        logging.getLogger(__name__).info(f" time: {parts}  peak memory: {peak:.0f}M")
