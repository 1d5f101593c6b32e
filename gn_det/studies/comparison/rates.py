"""The learning rate of each recipe: which of a few is best on pictures it does not train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gn_det.studies.comparison.results import RunResult
from gn_det.text import table

__all__ = ["Scores", "best_rates", "rates_table", "scores_of"]

# AP by learning rate; None where the run did not finish. By recipe and images per GPU.
Scores = dict[tuple[str, int], dict[float, float | None]]


def scores_of(results: Mapping[float, Sequence[RunResult]]) -> Scores:
    """The mean of box and mask AP of every run, by recipe and images per GPU.

    Args:
        results: by learning rate.
    """
    scores: Scores = {}
    for lr, at_that_rate in sorted(results.items()):
        for result in at_that_rate:
            scores.setdefault((result.recipe, result.ims_per_gpu), {})[lr] = result.mean_ap
    return scores


def best_rates(scores: Scores) -> dict[tuple[str, int], float]:
    """The rate with the highest AP, and the lowest such rate where several have it."""
    return {
        key: max(sorted(by_rate), key=lambda lr: -1.0 if by_rate[lr] is None else by_rate[lr])
        for key, by_rate in scores.items()
    }


def rates_table(scores: Scores) -> str:
    """AP of each recipe at each rate, and the rate that was chosen."""
    best = best_rates(scores)
    rates = sorted({lr for by_rate in scores.values() for lr in by_rate})
    rows = [
        [
            recipe,
            ims_per_gpu,
            *("failed" if (ap := by_rate.get(lr)) is None else f"{ap:.1f}" for lr in rates),
            f"{best[recipe, ims_per_gpu]:g}",
        ]
        for (recipe, ims_per_gpu), by_rate in scores.items()
    ]
    headers = ["", "images per GPU", *(f"AP at {lr:g}" for lr in rates), "chosen"]
    return table(rows, headers, tablefmt="github", disable_numparse=True)
