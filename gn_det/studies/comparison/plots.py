"""Plots of AP and cost."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from gn_det.plots.figures import deviation, new_figure, plot_mean, save_figure, set_log2_places
from gn_det.studies.comparison.results import (
    TASKS,
    Cost,
    RunResult,
    metrics_of,
    pairs_of,
    recipes_of,
    results_of,
)
from gn_det.text import printable

__all__ = ["plot_ap", "plot_cost", "plot_curves_of", "plot_groups"]


def plot_ap(results: Sequence[RunResult], png: Path, beside: Sequence[str] = ()) -> None:
    """AP against the images of a step, a line for each recipe, a bar for the spread over seeds.

    Recipes that are shown beside the comparison are dashed.
    """
    metrics = metrics_of(results)
    figure = new_figure(5.5 * len(metrics), 4)
    for axes, metric in zip(
        figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True
    ):
        for number, recipe in enumerate(recipes_of(results)):
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
    metrics = [*metrics_of(results), "total_loss"]
    figure = new_figure(4.5 * len(metrics), 3.4 * len(numbers))
    grid = figure.subplots(len(numbers), len(metrics), squeeze=False)
    for row, n in zip(grid, numbers, strict=True):
        for axes, metric in zip(row, metrics, strict=True):
            for recipe in recipes_of(results):
                curves = [o.curves.get(metric, {}) for o in results_of(results, recipe, n)]
                plot_mean(axes, curves, recipe, "--" if recipe in beside else "-")
            title = TASKS.get(metric, "training loss")
            axes.set(xlabel="images seen", ylabel=title, title=f"{n} image{'s' * (n > 1)} per GPU")
            axes.grid(alpha=0.3)
    grid[0, -1].legend(fontsize=8)
    save_figure(figure, png)


def plot_groups(groups: Mapping[str, Sequence[RunResult]], png: Path) -> None:
    """Mean of box and mask AP by group, a line for each recipe, a plot for each images per GPU."""
    pairs = pairs_of(chain.from_iterable(groups.values()))
    numbers = sorted({n for _, n in pairs})
    figure = new_figure(5.5 * len(numbers), 4)
    for axes, n in zip(figure.subplots(1, len(numbers), squeeze=False)[0], numbers, strict=True):
        for recipe in [recipe for recipe, its_n in pairs if its_n == n]:
            points = {}
            for place, results in enumerate(groups.values()):
                values = [run.mean_ap for run in results_of(results, recipe, n)]
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
