"""Tables of AP and cost, and a line of CSV for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from gn_det.plots.figures import mean_and_deviation
from gn_det.studies.comparison.results import (
    TASKS,
    Cost,
    RunResult,
    metrics_of,
    pairs_of,
    recipes_of,
    results_of,
)
from gn_det.text import csv_text, table

__all__ = ["ap_table", "cost_table", "groups_table", "results_csv"]


def ap_table(results: Sequence[RunResult], tablefmt: str = "github") -> str:
    """Mean ± sample standard deviation over the seeds, a row for each recipe."""
    numbers = sorted({o.ims_per_gpu for o in results})
    metrics = metrics_of(results)
    headers = ["", *(f"{TASKS[m]}, {n} image{'s' * (n > 1)}" for m in metrics for n in numbers)]
    rows = [
        [recipe]
        + [_cell(results_of(results, recipe, n), metric) for metric in metrics for n in numbers]
        for recipe in recipes_of(results)
    ]
    return table(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def groups_table(groups: Mapping[str, Sequence[RunResult]], tablefmt: str = "github") -> str:
    """Mean of box and mask AP, a row for each recipe and images per GPU, a column for each group.

    Args:
        groups: results by the title of their column.
        tablefmt: of tabulate.
    """
    rows = []
    for recipe, n in pairs_of(chain.from_iterable(groups.values())):
        cells = []
        for results in groups.values():
            runs = results_of(results, recipe, n)
            values = [value for run in runs if (value := run.mean_ap) is not None]
            cells.append(mean_and_deviation(values, len(runs)))
        rows.append([recipe, n, *cells])
    headers = ["", "images per GPU", *groups]
    return table(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def cost_table(costs: Sequence[Cost], tablefmt: str = "github") -> str:
    """MiB and milliseconds for each image, a row for each recipe."""
    numbers = sorted({cost.ims_per_gpu for cost in costs})
    titles = ("MiB saved an image", "ms an image")
    by = {(c.recipe, c.ims_per_gpu): (c.activation_mb, 1000 * c.seconds) for c in costs}
    headers = ["", *(f"{title}, {n} at a time" for title in titles for n in numbers)]
    rows = [
        [recipe]
        + [
            f"{by[recipe, n][column]:.1f}" if (recipe, n) in by else ""
            for column in range(len(titles))
            for n in numbers
        ]
        for recipe in dict.fromkeys(cost.recipe for cost in costs)
    ]
    return table(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def results_csv(results: Sequence[RunResult]) -> str:
    """A line for each run."""
    metrics = metrics_of(results)
    return csv_text(
        ["recipe", "ims_per_gpu", "seed", "ims_per_step", *metrics, "failure"],
        [
            [
                *(o.recipe, o.ims_per_gpu, o.seed, o.ims_per_step),
                *("" if o.ap(m) is None else f"{o.ap(m):.4f}" for m in metrics),
                o.failure,
            ]
            for o in results
        ],
    )


def _cell(results: Sequence[RunResult], metric: str) -> str:
    values = [value for o in results if (value := o.ap(metric)) is not None]
    return mean_and_deviation(values, len(results))
