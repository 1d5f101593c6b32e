"""The report of a conversion from BN to GN: the metric by stage, the error of each norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from gn_det.files import write_atomically, write_json
from gn_det.injection.convert_bn import Calibration
from gn_det.plots.figures import new_figure, save_figure
from gn_det.studies.conversion.stages import Conversion
from gn_det.text import markdown, table
from gn_det.version import __version__

__all__ = ["conversion_report", "images_shown", "plot_conversion", "stage_table", "write_report"]


def write_report(
    folder: Path,
    title: str,
    how: str,
    conversion: Conversion,
    metric: str,
    settings: Mapping[str, Any],
) -> None:
    """Write report.md, report.json and conversion.png.

    Args:
        folder: to write to.
        title, how: see :func:`conversion_report`.
        conversion: what was found.
        metric: name of what was evaluated; empty where nothing was.
        settings: of the conversion, for report.json.
    """
    calibration, values = conversion.calibration, conversion.metric
    plot_conversion(calibration, folder / "conversion.png", metric, values)
    text = conversion_report(title, how, calibration, metric, values)
    if conversion.losses:
        plot_distillation(conversion.losses, folder / "distillation.png")
    if conversion.levels:
        text += level_report(conversion)
    write_atomically(folder / "report.md", text)
    content = {
        "gn_det": __version__,
        **settings,
        "metric": metric,
        "stages": values,
        "levels": conversion.levels,
        "distillation_losses": conversion.losses,
        "calibration": asdict(calibration),
    }
    write_json(folder / "report.json", content)


def stage_table(metric: str, values: Mapping[str, float], tablefmt: str = "github") -> str:
    """A metric by stage.

    Args:
        metric: its name.
        values: by stage, in their order.
        tablefmt: of tabulate.
    """
    rows = [[stage, f"{value:.4g}"] for stage, value in values.items()]
    return table(rows, ["", metric], tablefmt=tablefmt, disable_numparse=True)


def images_shown(number: int, total: int) -> str:
    """How many training images a network saw, of how many there are."""
    images = f"{number} training image{'s' if number > 1 else ''}"
    return f"{images}, some of the {total} twice or more" if total < number else images


def conversion_report(
    source: str,
    how: str,
    calibration: Calibration,
    metric: str = "",
    values: Mapping[str, float] | None = None,
) -> str:
    """The report in Markdown.

    Args:
        source: what was converted.
        how: a paragraph on the calibration set, and on what loads the weights.
        calibration: of the norms.
        metric, values: see :func:`stage_table`; no values where nothing was evaluated.
    """
    stages = f"## By stage\n\n{stage_table(metric, values)}\n\n" if values else ""
    return f"""# {markdown(source)} from BN to GN

{how}

{stages}## Error of each norm

‖gn − bn‖ / ‖bn − mean(bn)‖ over the calibration set, gn being the output of the norm in the
converted model and bn that of the BN layer in the model as it was, its mean that of a channel: 1 is
no better than a constant in each channel. Copied: with γ, β of the BN. Calibrated: with γ, β fitted
by least squares, in {calibration.passes} passes over the calibration set.

![Error of each norm](conversion.png)

{calibration.to_markdown()}
"""


def level_report(conversion: Conversion) -> str:
    """The section on the distillation, in Markdown."""
    levels = conversion.levels
    names = [*next(iter(levels.values()))]
    rows = [[name, *(errors[name] for errors in levels.values())] for name in names]
    text = f"""
## Error of each level of features

‖gn − bn‖ / ‖bn − mean(bn)‖ of the feature maps of the whole backbone on held-out pictures, against
those of the model with BN.

{table(rows, ["level", *levels], tablefmt="github", floatfmt=".3f")}
"""
    if conversion.losses:
        text += f"""
The distillation took {len(conversion.losses)} steps. Its loss is the squared error of a channel
relative to its variance, a mean over channels and levels.

![Loss of each step](distillation.png)
"""
    return text


def plot_distillation(losses: Sequence[float], png: str | Path) -> None:
    """Draw the loss of each step, and its mean over the steps around."""
    figure = new_figure(6, 4)
    axes: Axes = figure.subplots()
    axes.plot(losses, color="C0", alpha=0.3, linewidth=1, label="step")
    width = max(1, len(losses) // 20)
    around = [losses[max(0, i - width) : i + width + 1] for i in range(len(losses))]
    axes.plot([sum(some) / len(some) for some in around], color="C0", label="mean around")
    axes.set(xlabel="step", ylabel="loss", title="Distillation", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, png)


def plot_conversion(
    calibration: Calibration,
    png: str | Path,
    metric: str = "",
    values: Mapping[str, float] | None = None,
) -> None:
    """Draw the error of each norm, copied and calibrated, and beside it the metric by stage.

    Args:
        calibration: of the norms.
        png: file to write.
        metric, values: see :func:`stage_table`; no values, no second panel.
    """
    rows = [row for row in calibration.rows if row.calibrated is not None]
    # What all names have in front tells them not apart.
    parents = zip(*(row.name.split(".")[:-1] for row in rows), strict=False)
    shared = ".".join(parts[0] for parts in takewhile(lambda parts: len({*parts}) == 1, parents))
    names = [row.name[len(shared) + bool(shared) :] for row in rows]
    width = min(max(6.0, 0.22 * len(rows)), 16.0)
    figure = new_figure(width + (4 if values else 0), 4.6)
    panels = figure.subplots(
        1, 1 + bool(values), squeeze=False, width_ratios=[width, 4][: 1 + bool(values)]
    )[0]
    errors: Axes = panels[0]
    for name in ("copied", "calibrated"):
        errors.plot([getattr(row, name) for row in rows], marker="o", markersize=4, label=name)
    errors.axhline(1, color="gray", linestyle="--", linewidth=1, label="a constant in each channel")
    errors.set_xticks(range(len(rows)), names, rotation=90, fontsize=7)
    errors.set(
        ylabel="relative error",
        title=f"Norms of {shared or 'the model'}, in order of execution",
        ylim=(0, None),
    )
    errors.grid(alpha=0.3)
    errors.legend(fontsize=8)
    if values:
        stages: Axes = panels[1]
        bars = stages.bar(range(len(values)), [*values.values()], color="C0")
        stages.bar_label(bars, fmt="%.3g", fontsize=8)
        stages.set_xticks(range(len(values)), [*values], fontsize=8)
        stages.margins(y=0.1)  # for the labels
        stages.set(title=metric, ylim=(min(0, *values.values()), None))
    save_figure(figure, png)
