"""Percentiles of a layer's values over a training, as numbers and as a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gn_det.analysis.figures import csv_text, new_figure, save_figure
from gn_det.errors import InputError

__all__ = ["PERCENTILES", "features_csv", "plot_features", "read_features"]

PERCENTILES = (1, 20, 80, 99)  # Wu & He 2018, figure 6

Features = Mapping[int, Mapping[int, float]]  # value by iteration, by percentile


def read_features(file: Path) -> Features:
    """What :class:`gn_det.engine.feature_distribution.FeatureDistribution` wrote.

    Raises:
        InputError: it wrote nothing there.
    """
    features: dict[int, dict[int, float]] = {percentile: {} for percentile in PERCENTILES}
    try:
        for line in file.read_text().splitlines():
            record = json.loads(line)
            for percentile in PERCENTILES:
                features[percentile][record["iteration"]] = record[str(percentile)]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"{file} has no features of a layer; remove {file.parent} to train it anew"
        ) from error
    return {percentile: dict(sorted(values.items())) for percentile, values in features.items()}


def features_csv(features: Mapping[str, Features]) -> str:
    """A line for each run and iteration."""
    return csv_text(
        ["run", "iteration", *(f"p{percentile}" for percentile in PERCENTILES)],
        [
            [name, iteration, *(values[percentile][iteration] for percentile in PERCENTILES)]
            for name, values in features.items()
            for iteration in values[PERCENTILES[0]]
        ],
    )


def plot_features(features: Mapping[str, Features], title: str, png: Path) -> None:
    """A panel for each run, a line for each percentile.

    Args:
        features: by the name of the run.
        title: of the layer.
        png: where to.
    """
    figure = new_figure(4 * len(features), 3.6)
    grid = figure.subplots(1, len(features), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(grid, features.items(), strict=True):
        for percentile in reversed(PERCENTILES):
            axes.plot(*zip(*values[percentile].items(), strict=True), label=f"{percentile}%")
        # Without a norm the first steps may leave all that follows no room.
        axes.set_yscale("symlog", linthresh=1)
        axes.set(xlabel="iteration", title=name)
        axes.grid(alpha=0.3)
    grid[0].set(ylabel=f"values of {title}")
    grid[-1].legend(fontsize=8)
    save_figure(figure, png)
