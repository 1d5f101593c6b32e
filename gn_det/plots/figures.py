"""What the figures and the files of their numbers have in common."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from gn_det.errors import InputError
from gn_det.files import make_folder, whole_file
from gn_det.text import printable

__all__ = [
    "check_new_png",
    "deviation",
    "mean_and_deviation",
    "new_figure",
    "plot_mean",
    "save_figure",
    "set_log2_places",
]


def new_figure(width: float, height: float) -> Figure:
    """A figure that needs no display; width and height are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def check_new_png(path: Path) -> None:
    """Check that a figure can be written to a file, and create its folder.

    Raises:
        InputError: the name does not end in .png, something is there already, or the folder cannot
            be written.
    """
    if path.suffix.lower() != ".png":
        raise InputError(f"--output {path}: a PNG file is written, so its name has to end in .png")
    if path.exists():
        raise InputError(f"{path} exists; remove it, or name another file with --output")
    make_folder(path.absolute().parent)


def save_figure(figure: Figure, png: str | Path, dpi: int = 110) -> None:
    """Write a figure as a PNG that is complete or not there at all.

    Texts may be names from files: what is not printable is shown as its escape, and dollar signs
    begin no mathematics.

    Args:
        figure: from :func:`new_figure`.
        png: file to write.
        dpi: pixels per inch.
    """
    for text in figure.findobj(Text):
        if text.get_text():  # the numbers at an axis come later, and may be mathematics
            text.set_text(printable(text.get_text(), keep="\n"))
            text.set_parse_math(False)
    with whole_file(Path(png)) as file:
        figure.savefig(file, dpi=dpi, format="png")


def set_log2_places(axes: Axes, places: Sequence[int]) -> None:
    """Give an x axis of powers of two a mark at each place and no other."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places], minor=False)
    axes.minorticks_off()


def deviation(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_deviation(values: Sequence[float], runs: int) -> str:
    """Mean ± sample standard deviation over those of some runs that finished.

    Args:
        values: of the runs that did.
        runs: how many there are.
    """
    if not runs:
        return ""
    if not values:
        return f"0 of {runs} finished"
    bounds = f" ± {deviation(values):.1f}" if len(values) > 1 else ""
    missing = f" ({len(values)} of {runs} finished)" if len(values) < runs else ""
    return f"{statistics.mean(values):.1f}{bounds}{missing}"


def plot_mean(
    axes: Axes, curves: Sequence[Mapping[int, float]], label: str, linestyle: str
) -> None:
    """Draw the mean of curves where all have a value, and their deviation in a lighter tone.

    Args:
        axes: to draw into.
        curves: value by place, one for each seed.
        label, linestyle: of the line.
    """
    values: dict[int, list[float]] = {}
    for curve in curves:
        for place, value in curve.items():
            values.setdefault(place, []).append(value)
    places = sorted(place for place, found in values.items() if len(found) == len(curves))
    means = [statistics.mean(values[place]) for place in places]
    spreads = [deviation(values[place]) for place in places]
    marker = "o" if len(places) < 20 else None
    (line,) = axes.plot(places, means, label=label, marker=marker, linestyle=linestyle)
    low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
    high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(places, low, high, alpha=0.15, color=line.get_color())
