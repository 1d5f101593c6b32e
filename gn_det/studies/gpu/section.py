"""What a section of the report found: figures whose checks passed, faults, what was left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from gn_det.text import reason_of

__all__ = ["LeftOut", "Section"]


class LeftOut(Exception):  # noqa: N818  (it is no error)
    """Something that cannot be done here; the message says why."""


@dataclass
class Section:
    """What one section found.

    Attributes:
        title: of the section.
        budget: seconds after which it begins nothing more.
        rows: figures, a column by name each; only of what passed its checks.
        faults: checks that failed, and why.
        left_out: what was not done, and why.
        seconds: that it took.
    """

    title: str
    budget: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._start = time.monotonic()

    def check(self, what: str, measure: Callable[[], dict[str, Any] | None]) -> None:
        """Add the figures that measure returns, if any; its error is a fault instead.

        What does not fit into the card's memory, or would begin after the budget, is left out.
        """
        if time.monotonic() - self._start > self.budget:
            self.left_out.append(f"{what}: the {self.budget:.0f} s of this section were over")
            return
        try:
            row = measure()
            if row is not None:
                self.rows.append(row)
        except torch.OutOfMemoryError:
            self.left_out.append(f"{what}: does not fit into the memory of this card")
        except LeftOut as reason:
            self.left_out.append(f"{what}: {reason}")
        except Exception as error:
            self.faults.append(f"{what}: {type(error).__name__}: {reason_of(error)}")
        self.seconds = time.monotonic() - self._start

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
