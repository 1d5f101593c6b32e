"""The report of a comparison, and that of several on parts of the data or numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from detectron2.config import CfgNode

from gn_det.config.differences import differences
from gn_det.files import write_atomically, write_json
from gn_det.studies.comparison.outcome import Outcome
from gn_det.studies.comparison.plots import plot_ap, plot_cost, plot_curves_of, plot_groups
from gn_det.studies.comparison.rates import Scores, rates_table
from gn_det.studies.comparison.results import Cost, RunResult
from gn_det.studies.comparison.tables import ap_table, cost_table, groups_table, results_csv
from gn_det.text import markdown
from gn_det.version import __version__

__all__ = ["write_report", "write_summary"]


def write_report(
    output: Path,
    compared: dict[str, CfgNode],
    recipes: dict[str, CfgNode],
    held_out: str,
    results: Sequence[RunResult],
    costs: Sequence[Cost],
    scores: Scores,
) -> None:
    """Write report.md, report.json, runs.csv and the plots, and print the tables.

    Args:
        output: folder of the report.
        compared: recipes that are equal in all but the norm, by name.
        recipes: these, and those that are shown beside them.
        held_out: what was evaluated on, in words.
        results: of every run.
        costs: of a step of every recipe.
        scores: of learning rates; empty where there was one.
    """
    beside = [name for name in recipes if name not in compared]
    plot_ap(results, output / "ap.png", beside)
    plot_curves_of(results, output / "curves.png", beside)
    plot_cost(costs, output / "cost.png")
    write_atomically(output / "runs.csv", results_csv(results))
    content = {
        "gn_det": __version__,
        "differences": differences(recipes),
        "runs": [asdict(result) for result in results],
        "costs": [asdict(cost) for cost in costs],
        "rates": [
            {"recipe": recipe, "ims_per_gpu": n, "ap": by_rate}
            for (recipe, n), by_rate in scores.items()
        ],
    }
    write_json(output / "report.json", content)
    text = _report_text(compared, recipes, held_out, results, costs, scores)
    write_atomically(output / "report.md", text)
    print(f"\n{ap_table(results, 'simple')}\n\n{cost_table(costs, 'simple')}\n")
    print(f"The report is {output / 'report.md'}.")


def _report_text(
    compared: dict[str, CfgNode],
    recipes: dict[str, CfgNode],
    held_out: str,
    results: Sequence[RunResult],
    costs: Sequence[Cost],
    scores: Scores,
) -> str:
    """The report in Markdown."""
    names = markdown(", ".join(compared))
    beside = markdown(", ".join(name for name in recipes if name not in compared))
    seeds = sorted({o.seed for o in results})
    first = next(iter(compared.values()))
    differing = "\n".join(
        f"- `{key}`: "
        + ", ".join(markdown(f"{value!r} in {name}") for name, value in values.items())
        for key, values in differences(recipes).items()
    )
    failed = "".join(
        f"- {markdown(o.recipe)}, {o.ims_per_gpu} at a time, seed {o.seed}: {markdown(o.failure)}\n"
        for o in results
        if o.failure
    )
    rate = f"a learning rate of {first.SOLVER.BASE_LR:g}" if not scores else "rates as below"
    return f"""# Comparison of {names}

COCO AP on {markdown(held_out)} after training, mean ± sample standard deviation over
{len(seeds)} seed{"s" * (len(seeds) > 1)} ({", ".join(map(str, seeds))}), by images on a GPU.

{ap_table(results)}

![AP](ap.png)

![Curves](curves.png)

Cost of a step on the {_device_name(first)}, of the trained models on the same images: what the
forward pass keeps for the backward pass, and the median time of both.

{cost_table(costs)}

![Cost](cost.png)

## What was held equal

Every setting of {names} but those below: model, heads, data, augmentation, optimizer
and schedule ({first.SOLVER.MAX_ITER} iterations of {first.SOLVER.IMS_PER_BATCH} images at
{rate}; for other numbers of images the learning rate follows in
proportion, and all see as many images). Runs of one seed see the same images in the same order.
{f"Shown beside, and not equal: {beside}." if beside else ""}

{differing}
{_rates_text(scores, seeds[0]) if scores else ""}
{chr(10) + "## What did not finish" + chr(10) * 2 + failed if failed else ""}"""


def _rates_text(scores: Scores, seed: int) -> str:
    """The part of the report on learning rates."""
    return f"""
## Learning rates

Each recipe has the rate with the highest AP (mean of box and mask) on a quarter of the training
pictures, after training on the others (seed {seed}). Rates are for a step of the reference.

{rates_table(scores)}
"""


def write_summary(output: Path, outcomes: Sequence[Outcome]) -> None:
    """Write report.md and parts.png of several comparisons, by training pictures and steps."""
    groups = {_name_of(outcome): outcome.results for outcome in outcomes}
    links = "\n".join(
        f"- [{_name_of(outcome)}]({outcome.comparison.folder.relative_to(output)}/report.md)"
        for outcome in outcomes
    )
    plot_groups(groups, output / "parts.png")
    text = f"""# AP by training pictures and steps

Mean of box and mask AP, mean ± sample standard deviation over the seeds.

{groups_table(groups)}

![AP](parts.png)

{links}
"""
    write_atomically(output / "report.md", text)
    print(f"\n{groups_table(groups, 'simple')}\n\nThe report is {output / 'report.md'}.")


def _name_of(outcome: Outcome) -> str:
    cfg, pictures = outcome.runs[0].cfg, outcome.comparison.pictures
    images = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE_STEPS
    return f"{pictures or 'all'} pictures, {images} images seen"


def _device_name(cfg: CfgNode) -> str:
    """What the runs trained on, in words."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({torch.get_num_threads()} threads)"
