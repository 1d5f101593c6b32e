"""The report of a comparison: tables of AP and cost, and their plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gn_det.plots.figures import (
    csv_text,
    deviation,
    mean_and_deviation,
    new_figure,
    plot_mean,
    save_figure,
    set_log2_places,
)
from gn_det.utils import printable, table

__all__ = [
    "TASKS",
    "Cost",
    "RunResult",
    "ap_table",
    "cost_table",
    "groups_table",
    "plot_ap",
    "plot_cost",
    "plot_curves_of",
    "plot_groups",
    "results_csv",
]

TASKS = {"bbox/AP": "box AP", "segm/AP": "mask AP"}


@dataclass(frozen=True)
class RunResult:
    """What a run reached.

    Attributes:
        recipe, ims_per_gpu, seed: which run.
        ims_per_step: images of a step.
        failure: why it did not finish; empty where it did.
        curves: by metric, its values by the images seen; the last AP is that of the run.
    """

    recipe: str
    ims_per_gpu: int
    seed: int
    ims_per_step: int
    failure: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict)

    def ap(self, metric: str) -> float | None:
        """The last value of bbox/AP or segm/AP; None for a run that did not finish.

        Detectron2 has NaN where nothing was detected, which is an AP of 0.
        """
        curve = self.curves.get(metric)
        if not curve or self.failure:
            return None
        last = curve[max(curve)]
        return 0.0 if math.isnan(last) else last


@dataclass(frozen=True)
class Cost:
    """What a training step of a recipe costs, per image.

    Attributes:
        recipe, ims_per_gpu: which.
        activation_mb: MiB kept for the backward pass.
        seconds: of a forward and backward pass.
    """

    recipe: str
    ims_per_gpu: int
    activation_mb: float
    seconds: float


def ap_table(results: Sequence[RunResult], tablefmt: str = "github") -> str:
    """Mean ± sample standard deviation over the seeds, a row for each recipe."""
    numbers = sorted({o.ims_per_gpu for o in results})
    metrics = _metrics(results)
    headers = ["", *(f"{TASKS[m]}, {n} image{'s' * (n > 1)}" for m in metrics for n in numbers)]
    rows = [
        [recipe] + [_cell(_of(results, recipe, n), metric) for metric in metrics for n in numbers]
        for recipe in _recipes(results)
    ]
    return table(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def groups_table(groups: Mapping[str, Sequence[RunResult]], tablefmt: str = "github") -> str:
    """Mean of box and mask AP, a row for each recipe and images per GPU, a column for each group.

    Args:
        groups: results by the title of their column.
        tablefmt: of tabulate.
    """
    rows = []
    for recipe, n in _kinds(groups):
        cells = []
        for results in groups.values():
            runs = _of(results, recipe, n)
            values = [value for run in runs if (value := _mean_ap(run)) is not None]
            cells.append(mean_and_deviation(values, len(runs)))
        rows.append([recipe, n, *cells])
    headers = ["", "images at a time", *groups]
    return table(rows, headers, tablefmt=tablefmt, disable_numparse=True)


def plot_groups(groups: Mapping[str, Sequence[RunResult]], png: Path) -> None:
    """Mean of box and mask AP by group, a line for each recipe, a plot for each images per GPU."""
    numbers = sorted({n for _, n in _kinds(groups)})
    figure = new_figure(5.5 * len(numbers), 4)
    for axes, n in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        for recipe in [recipe for recipe, its_n in _kinds(groups) if its_n == n]:
            points = {}
            for place, results in enumerate(groups.values()):
                values = [_mean_ap(run) for run in _of(results, recipe, n)]
                if found := [value for value in values if value is not None]:
                    points[place] = found
            axes.errorbar(
                [*points],
                [statistics.mean(values) for values in points.values()],
                [deviation(values) for values in points.values()],
                marker="o",
                capsize=3,
                label=recipe,
            )
        axes.set_xticks(range(len(groups)), [*groups], rotation=15, ha="right")
        title = f"{n} image{'s' * (n > 1)} per GPU"
        axes.set(ylabel="mean of box and mask AP", title=title, ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, png)


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
    metrics = _metrics(results)
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


def plot_ap(results: Sequence[RunResult], png: Path, beside: Sequence[str] = ()) -> None:
    """AP against the images of a step, a line for each recipe, a bar for the spread over seeds.

    Recipes that are shown beside the comparison are dashed.
    """
    metrics = _metrics(results)
    figure = new_figure(5.5 * len(metrics), 4)
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for number, recipe in enumerate(_recipes(results)):
            points: dict[int, list[float]] = {}
            for result in results:
                if result.recipe == recipe and result.ap(metric) is not None:
                    points.setdefault(result.ims_per_step, []).append(result.ap(metric))
            places = sorted(points)
            axes.errorbar(
                [place * (1 + 0.012 * number) for place in places],  # bars beside each other
                [statistics.mean(points[place]) for place in places],
                [deviation(points[place]) for place in places],
                marker="o",
                linestyle="--" if recipe in beside else "-",
                capsize=3,
                label=recipe,
            )
        steps = sorted({result.ims_per_step for result in results})
        set_log2_places(axes, steps)
        axes.set(xlabel="images per step", ylabel=TASKS[metric], ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, png)


def plot_curves_of(results: Sequence[RunResult], png: Path, beside: Sequence[str] = ()) -> None:
    """AP and training loss against the images seen, a row for each number of images per GPU.

    Means over the seeds, their spread in a lighter tone; recipes beside the comparison are dashed.
    """
    numbers = sorted({o.ims_per_gpu for o in results})
    metrics = [*_metrics(results), "total_loss"]
    figure = new_figure(4.5 * len(metrics), 3.4 * len(numbers))
    grid = figure.subplots(len(numbers), len(metrics), squeeze=False)
    for row, n in zip(grid, numbers, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for recipe in _recipes(results):
                curves = [o.curves.get(metric, {}) for o in _of(results, recipe, n)]
                plot_mean(axes, curves, recipe, "--" if recipe in beside else "-")
            title = TASKS.get(metric, "training loss")
            axes.set(xlabel="images seen", ylabel=title, title=f"{n} image{'s' * (n > 1)} per GPU")
            axes.grid(alpha=0.3)
    grid[0, -1].legend(fontsize=8)
    save_figure(figure, png)


def plot_cost(costs: Sequence[Cost], png: Path) -> None:
    """Bars of activation memory and time for each image."""
    figure = new_figure(11, 4)
    numbers = sorted({cost.ims_per_gpu for cost in costs})
    recipes = list(dict.fromkeys(cost.recipe for cost in costs))
    width = 0.8 / max(1, len(numbers))
    for axes, (key, scale, title) in zip(
        figure.subplots(1, 2),
        (
            ("activation_mb", 1, "MiB saved for backward, an image"),
            ("seconds", 1000, "ms an image"),
        ),
        strict=True,
    ):
        for place, n in enumerate(numbers):
            by = {c.recipe: getattr(c, key) * scale for c in costs if c.ims_per_gpu == n}
            bars = axes.bar(
                [i + (place - (len(numbers) - 1) / 2) * width for i in range(len(recipes))],
                [by.get(recipe, 0.0) for recipe in recipes],
                width,
                label=f"{n} at a time",
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_xticks(range(len(recipes)), list(map(printable, recipes)), rotation=20, ha="right")
        axes.set(ylabel=title)
        axes.grid(alpha=0.3, axis="y")
    if costs:
        axes.legend(fontsize=8)
    save_figure(figure, png)


def _metrics(results: Sequence[RunResult]) -> list[str]:
    found = [metric for metric in TASKS if any(metric in o.curves for o in results)]
    return found or ["bbox/AP"]  # where nothing finished


def _recipes(results: Sequence[RunResult]) -> list[str]:
    return list(dict.fromkeys(o.recipe for o in results))


def _of(results: Sequence[RunResult], recipe: str, ims_per_gpu: int) -> list[RunResult]:
    return [o for o in results if (o.recipe, o.ims_per_gpu) == (recipe, ims_per_gpu)]


def _kinds(groups: Mapping[str, Sequence[RunResult]]) -> list[tuple[str, int]]:
    """Recipe and images per GPU of every result."""
    results = [result for group in groups.values() for result in group]
    return list(dict.fromkeys((result.recipe, result.ims_per_gpu) for result in results))


def _mean_ap(result: RunResult) -> float | None:
    values = [value for task in TASKS if (value := result.ap(task)) is not None]
    return statistics.mean(values) if values else None


def _cell(results: Sequence[RunResult], metric: str) -> str:
    values = [value for o in results if (value := o.ap(metric)) is not None]
    return mean_and_deviation(values, len(results))
