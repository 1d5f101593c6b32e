"""Loss and AP over training, from metrics.json."""

from __future__ import annotations

import json
from pathlib import Path

from gn_det.errors import InputError
from gn_det.plots.figures import new_figure, save_figure

__all__ = ["plot_curves", "read_metrics"]


def read_metrics(metrics_file: str | Path) -> dict[str, dict[int, float]]:
    """Read Detectron2's metrics.json.

    Returns:
        Value by iteration, by the metric's name; where a resumed run went over an iteration
        again, its later value.

    Raises:
        InputError: the file cannot be read, or a line of it is no JSON.
    """
    metrics: dict[str, dict[int, float]] = {}
    try:
        for line in Path(metrics_file).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            for name, value in record.items():
                metrics.setdefault(name, {})[record["iteration"]] = value
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{metrics_file} cannot be read as metrics: {error}") from error
    return metrics


def plot_curves(metrics_file: str | Path, png: str | Path) -> None:
    """Draw the losses, and AP where it was evaluated, against the iteration."""
    metrics = read_metrics(metrics_file)
    figure = new_figure(11, 4)
    losses, aps = figure.subplots(1, 2)
    for name in sorted(metrics, key=lambda name: name != "total_loss"):
        if "loss" in name:
            width = 2.0 if name == "total_loss" else 1.0
            losses.plot(*_sorted(metrics[name]), label=name, linewidth=width)
    losses.set(xlabel="iteration", ylabel="loss", title="Training loss")
    losses.legend(fontsize=8)
    for task, label in (("bbox", "box AP"), ("segm", "mask AP"), ("keypoints", "keypoint AP")):
        if f"{task}/AP" in metrics:
            aps.plot(*_sorted(metrics[f"{task}/AP"]), marker="o", label=label)
    aps.set(xlabel="iteration", ylabel="AP", title="COCO AP, held-out split", ylim=(0, None))
    if aps.lines:
        aps.legend()
    for axes in (losses, aps):
        axes.grid(alpha=0.3)
    save_figure(figure, png)


def _sorted(values: dict[int, float]) -> tuple[list[int], list[float]]:
    iterations = sorted(values)
    return iterations, [values[i] for i in iterations]
