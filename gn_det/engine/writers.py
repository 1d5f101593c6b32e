"""Where metrics go: Detectron2's writers, and a console line of where the time went."""

from __future__ import annotations

import logging

from detectron2.engine import default_writers
from detectron2.utils.events import EventWriter, get_event_storage

__all__ = ["build_writers"]


def build_writers(output_dir: str, max_iter: int) -> list[EventWriter]:
    """Detectron2's default writers, and a console line of the shares of time and peak memory."""
    return [*default_writers(output_dir, max_iter), _SharePrinter(max_iter)]


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
