"""The report of a sweep over norms: error tables and figures, as in the GN paper."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_det.plots.figures import (
    deviation,
    mean_and_deviation,
    new_figure,
    plot_mean,
    save_figure,
    set_log2_places,
)
from gn_det.text import csv_text, table

__all__ = [
    "ClassifierResult",
    "describe_degradation",
    "error_table",
    "plot_error_by_batch",
    "plot_error_curves",
    "plot_group_errors",
    "results_csv",
]


@dataclass(frozen=True)
class ClassifierResult:
    """A classifier of a sweep.

    Attributes:
        norm, num_groups, channels_per_group, ims_per_gpu, seed: of its recipe.
        val_error, train_error: in percent; None where it did not finish.
        failure: why it did not; empty where it did.
        curves: ``error/train`` and ``error/val`` by epoch.
    """

    norm: str
    num_groups: int | None
    channels_per_group: int | None
    ims_per_gpu: int
    seed: int
    val_error: float | None = None
    train_error: float | None = None
    failure: str = ""
    curves: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)


def results_csv(trained: Sequence[ClassifierResult]) -> str:
    """A line for each classifier."""
    names = [name for name in ClassifierResult.__dataclass_fields__ if name != "curves"]
    return csv_text(names, [[getattr(t, name) for name in names] for t in trained])


def error_table(
    trained: Sequence[ClassifierResult],
    row: Callable[[ClassifierResult], Any],
    column: Callable[[ClassifierResult], Any],
    corner: str,
    metric: str = "val_error",
) -> str:
    """Errors in percent, mean ± sample standard deviation over the seeds.

    Args:
        trained: in the order of rows and columns.
        row, column: which cell a classifier belongs to.
        corner: what the columns are.
        metric: "val_error" or "train_error".
    """
    columns = list(dict.fromkeys(map(column, trained)))
    rows = []
    for name in dict.fromkeys(map(row, trained)):
        cells = [[t for t in trained if (row(t), column(t)) == (name, c)] for c in columns]
        rows.append(
            [name, *(mean_and_deviation(_errors(cell, metric), len(cell)) for cell in cells)]
        )
    return table(rows, [corner, *columns], tablefmt="github", disable_numparse=True)


def describe_degradation(trained: Sequence[ClassifierResult]) -> str:
    """A sentence for each norm: what its error does from the most images per step to the fewest.

    A change counts where it is above twice the standard error of the difference over the seeds,
    which takes two of them.
    """
    sizes = sorted({t.ims_per_gpu for t in trained})
    few, many = sizes[0], sizes[-1]
    if few == many:
        return f"There are {few} images per step only, and nothing to compare."
    sentences = []
    for norm in dict.fromkeys(t.norm for t in trained):
        at = {
            size: _errors([t for t in trained if (t.norm, t.ims_per_gpu) == (norm, size)])
            for size in (few, many)
        }
        if min(map(len, at.values())) < 2:
            sentences.append(f"{norm}: too few runs finished to say.")
            continue
        change = statistics.mean(at[few]) - statistics.mean(at[many])
        noise = sum(deviation(errors) ** 2 / len(errors) for errors in at.values()) ** 0.5
        verdict = (
            "no more than the seeds make"
            if abs(change) <= 2 * noise
            else ("it degrades" if change > 0 else "it improves")
        )
        sentences.append(
            f"{norm}: from {many} to {few} images per step the error changes by {change:+.1f} ± "
            f"{noise:.1f} points: {verdict}."
        )
    return "\n".join(sentences)


def plot_error_by_batch(trained: Sequence[ClassifierResult], png: Path) -> None:
    """Validation error against images per step, from many to few (Wu & He 2018, figure 1)."""
    figure = new_figure(5.5, 4)
    axes = figure.subplots()
    sizes = sorted({t.ims_per_gpu for t in trained}, reverse=True)
    for norm in dict.fromkeys(t.norm for t in trained):
        curves = _by_seed([t for t in trained if t.norm == norm], lambda t: t.ims_per_gpu)
        plot_mean(axes, curves, norm, "-")
    set_log2_places(axes, sizes)
    axes.set_xlim(sizes[0] * 1.2, sizes[-1] / 1.2)
    axes.set(xlabel="images per step", ylabel="validation error (%)")
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, png)


def plot_error_curves(trained: Sequence[ClassifierResult], png: Path) -> None:
    """Training and validation error by epoch at the most images per step (figure 4)."""
    most = max(t.ims_per_gpu for t in trained)
    figure = new_figure(11, 4)
    grid = figure.subplots(1, 2, sharey=True)
    for axes, metric, title in zip(
        grid, ("error/train", "error/val"), ("training", "validation"), strict=True
    ):
        for norm in dict.fromkeys(t.norm for t in trained):
            runs = [t for t in trained if (t.norm, t.ims_per_gpu) == (norm, most)]
            plot_mean(axes, [t.curves.get(metric, {}) for t in runs], norm, "-")
        axes.set(
            xlabel="epoch", ylabel=f"{title} error (%)", title=f"{title}, {most} images per step"
        )
        axes.grid(alpha=0.3)
    grid[0].legend()
    save_figure(figure, png)


def plot_group_errors(trained: Sequence[ClassifierResult], png: Path) -> None:
    """Validation error by number of groups and by channels in each (Wu & He 2018, table 3)."""
    figure = new_figure(9, 3.6)
    grid = figure.subplots(1, 2, sharey=True)
    for axes, name, title, ends in zip(
        grid,
        ("num_groups", "channels_per_group"),
        ("groups", "channels per group"),
        ("1 is LN", "1 is IN"),
        strict=True,
    ):
        of_kind = [t for t in trained if getattr(t, name) is not None]
        plot_mean(axes, _by_seed(of_kind, lambda t, name=name: getattr(t, name)), "GN", "-")
        places = sorted({getattr(t, name) for t in of_kind})
        set_log2_places(axes, places)
        axes.set(xlabel=f"{title} ({ends})", ylabel="validation error (%)")
        axes.grid(alpha=0.3)
    save_figure(figure, png)


def _errors(trained: Sequence[ClassifierResult], metric: str = "val_error") -> list[float]:
    return [error for t in trained if (error := getattr(t, metric)) is not None]


def _by_seed(
    trained: Sequence[ClassifierResult], place: Callable[[ClassifierResult], int]
) -> list[dict[int, float]]:
    """Error by place, for each seed."""
    seeds = dict.fromkeys(t.seed for t in trained)
    return [
        {place(t): t.val_error for t in trained if t.seed == seed and t.val_error is not None}
        for seed in seeds
    ]
