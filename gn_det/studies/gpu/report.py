"""report.md and report.json of what was found, and its two plots."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gn_det.files import write_atomically, write_json
from gn_det.studies.gpu.section import Section
from gn_det.text import markdown

__all__ = ["PLOTS", "has_failed", "write_plots", "write_report"]

PLOTS = ("bandwidth.png", "memory.png")


def has_failed(sections: Mapping[str, Section]) -> bool:
    """Whether any check did."""
    return any(found.faults for found in sections.values())


def write_report(
    folder: Path, environment: Mapping[str, Any], sections: Mapping[str, Section]
) -> None:
    """Write report.md and report.json as far as the sections have come."""
    data = {
        "passed": not has_failed(sections),
        "environment": dict(environment),
        "sections": {name: found.as_dict() for name, found in sections.items()},
    }
    write_json(folder / "report.json", data)
    failed = [name for name, found in sections.items() if found.faults]
    verdict = f"**Failed: {', '.join(failed)}.**" if failed else "Every check that ran passed."
    lines = ["# gn_det on this GPU", "", verdict, ""]
    lines += [f"- {markdown(name)}: {markdown(fact)}" for name, fact in environment.items()]
    for found in sections.values():
        lines += ["", f"## {found.title}", "", f"{found.seconds:.0f} s."]
        for kind, texts in (("Failed", found.faults), ("Left out", found.left_out)):
            lines += ["", *(f"- {kind}: {markdown(text)}" for text in texts)] if texts else []
        lines += ["", *_table(found.rows)] if found.rows else []
    drawn = [plot for plot in PLOTS if (folder / plot).exists()]
    lines += [line for plot in drawn for line in ("", f"![{plot}]({plot})")]
    write_atomically(folder / "report.md", "\n".join(lines) + "\n")


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """A Markdown table, without tabulate, which may be missing; a cell that is missing is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    header = [markdown(column) for column in columns]
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(columns), *cells)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else markdown(value)


def write_plots(folder: Path, sections: Mapping[str, Section]) -> None:
    """Draw what was measured; a plot without figures is not there, nor left from before."""
    for plot in PLOTS:
        with suppress(FileNotFoundError):
            (folder / plot).unlink()
    times = sections["times"].rows if "times" in sections else []
    steps = sections["steps"].rows if "steps" in sections else []
    if times:
        _plot_bandwidth(folder / PLOTS[0], times)
    if steps:
        _plot_memory(folder / PLOTS[1], steps)


def _plot_bandwidth(png: Path, rows: list[dict[str, Any]]) -> None:
    """Ours as a share of the copy bandwidth, and its time against the fastest other."""
    from gn_det.plots.figures import new_figure, save_figure

    labels = [f"{row['site']}\n{row['dtype']} {row['layout']}" for row in rows]
    figure = new_figure(1.2 * len(rows) + 2, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, direction in enumerate(("forward", "backward")):
        places = [place + 0.4 * number for place in range(len(rows))]
        shares = [float(row[f"{direction} of copy"].rstrip("%")) for row in rows]
        upper.bar(places, shares, 0.4, label=direction)
        ratios = [
            min(
                value for name, value in row.items()
                if name.endswith(f"{direction} ms") and not name.startswith("ours")
            ) / row[f"ours {direction} ms"]
            for row in rows
        ]  # fmt: skip
        lower.bar(places, ratios, 0.4, label=direction)
    upper.set_ylabel("% of copy bandwidth")
    upper.legend()
    lower.axhline(1, color="black", linewidth=1)
    lower.set_ylabel("fastest other / ours")
    lower.set_xticks(range(len(rows)), labels, rotation=60, ha="right", fontsize=7)
    save_figure(figure, png)


def _plot_memory(png: Path, rows: list[dict[str, Any]]) -> None:
    """A training step's milliseconds, and its peak memory beside the forecast."""
    from gn_det.plots.figures import new_figure, save_figure

    labels = [f"{row['norm']}\n{row['images']}, {row['precision']}" for row in rows]
    places = range(len(rows))
    figure = new_figure(0.7 * len(rows) + 2, 6)
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.bar(places, [row["step ms"] for row in rows], 0.7)
    upper.set_ylabel("ms, forward and backward")
    for number, column in enumerate(("peak MiB", "forecast MiB")):
        heights = [row.get(column, 0) for row in rows]  # the CPU has no peak
        lower.bar([place + 0.4 * number for place in places], heights, 0.4, label=column)
    lower.set_ylabel("MiB")
    lower.legend()
    lower.set_xticks(places, labels, rotation=60, ha="right", fontsize=7)
    save_figure(figure, png)
