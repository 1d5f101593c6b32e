"""A comparison on one training set for one number of steps, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gn_det.data.facts import DataFacts
from gn_det.engine.command import RunOptions
from gn_det.studies.comparison.matrix import Run
from gn_det.studies.comparison.results import RunResult

__all__ = ["Comparison", "Outcome"]


@dataclass(frozen=True)
class Comparison:
    """The recipes on one training set, for one number of steps.

    Attributes:
        folder: of its runs and its report.
        options: with the training set.
        pictures: of a part of the training set; None for all.
        steps: of the reference schedule; None for those of the recipes.
    """

    folder: Path
    options: RunOptions
    pictures: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a comparison found.

    Attributes:
        comparison: which.
        runs: its matrix.
        results: of each run.
        facts: of the training set; None where it is no folder.
    """

    comparison: Comparison
    runs: Sequence[Run]
    results: Sequence[RunResult]
    facts: DataFacts | None = None
