"""What a plot shows, as numbers."""

from __future__ import annotations

from matplotlib.axes import Axes

__all__ = ["lines_of"]


def lines_of(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line that has a label."""
    return {
        str(line.get_label()): [*zip(*line.get_data(), strict=True)]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
