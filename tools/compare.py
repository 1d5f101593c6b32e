"""Compare norms: train a matrix of recipes, images per GPU and seeds, and report AP and cost.

The recipes must be equal in all but the norm. What is interrupted goes on when this is run again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from gn_det.engine.command import RunOptions, add_data_arguments, add_overrides, run_command
from gn_det.engine.folders import study_folder
from gn_det.engine.run import check_run
from gn_det.engine.run_data import RunData
from gn_det.engine.schedule import resolve_schedule

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model

from gn_det.checkpoint import Checkpointer
from gn_det.config import load_config
from gn_det.data.train_loader import build_train_loader
from gn_det.errors import InputError
from gn_det.plots.curves import read_metrics
from gn_det.studies.comparison.cost import saved_bytes, step_seconds
from gn_det.studies.comparison.matrix import (
    Run,
    check_comparable,
    check_folders,
    differences,
    run_all,
)
from gn_det.studies.comparison.report import (
    Cost,
    RunResult,
    ap_table,
    cost_table,
    plot_ap,
    plot_cost,
    plot_curves_of,
    results_csv,
)
from gn_det.utils import markdown, write_atomically
from gn_det.version import __version__


def main() -> int:
    args = parse_arguments()
    if min(args.ims_per_gpu) < 1:
        raise InputError(f"--ims-per-gpu {min(args.ims_per_gpu)}: a GPU holds at least 1 image")
    if min(args.seeds) < 0:
        raise InputError(f"--seeds {min(args.seeds)}: at least 0, so that a run can be repeated")
    recipes = read_recipes(args.recipes, args.beside, args.opts)
    compared = {Path(file).stem: recipes[Path(file).stem] for file in args.recipes}
    check_comparable(compared)
    runs = matrix(recipes, args)
    options = RunOptions.from_args(args)
    data = None
    for run in runs:
        data = check_run(run.cfg, options, args.output, data)
    with study_folder(args.output):
        check_folders(runs)
        data.write_copies()
        failures = run_all(runs, Path(__file__).with_name("train_net.py"), args.jobs, args.num_gpus)
        results = [result(run, failures.get(run.name, "")) for run in runs]
        costs = measure(runs)
        report(args.output, compared, recipes, held_out(data), results, costs)
    return 1 if failures else 0


def read_recipes(
    compared: Sequence[str], beside: Sequence[str], overrides: Sequence[str]
) -> dict[str, CfgNode]:
    """Configs by the stem of their files."""
    recipes: dict[str, CfgNode] = {}
    for file in [*compared, *beside]:
        name = Path(file).stem
        if name in recipes:
            raise InputError(f"two recipes are called {name}, and would share folders")
        recipes[name] = load_config(file, overrides)
    return recipes


def matrix(recipes: dict[str, CfgNode], args: argparse.Namespace) -> list[Run]:
    """Every run, those of one seed beside each other."""
    runs = []
    for seed in args.seeds:
        for ims_per_gpu in args.ims_per_gpu:
            for name, recipe in recipes.items():
                cfg = recipe.clone()
                cfg.SOLVER.IMS_PER_GPU = ims_per_gpu
                if args.quick:
                    shorten(cfg)
                cfg = resolve_schedule(cfg, args.num_gpus)
                cfg.SEED = seed
                run = Run(name, ims_per_gpu, seed, cfg)
                cfg.OUTPUT_DIR = str(args.output / "runs" / run.name)
                runs.append(run)
    return runs


def shorten(cfg: CfgNode) -> None:
    """A quarter of the iterations, the warm-up and the periods."""
    solver = cfg.SOLVER
    solver.MAX_ITER = max(1, solver.MAX_ITER // 4)
    solver.STEPS = tuple(step // 4 for step in solver.STEPS)
    solver.WARMUP_ITERS //= 4
    solver.CHECKPOINT_PERIOD = max(1, solver.CHECKPOINT_PERIOD // 4)
    cfg.TEST.EVAL_PERIOD //= 4


def result(run: Run, failure: str) -> RunResult:
    """What a run has left in metrics.json, by the images that it had seen."""
    step = run.cfg.SOLVER.IMS_PER_BATCH * run.cfg.SOLVER.ACCUMULATE_STEPS
    curves = {}
    if (run.folder / "metrics.json").exists():
        metrics = read_metrics(run.folder / "metrics.json")
        for name in ("bbox/AP", "segm/AP", "total_loss"):
            if name in metrics:
                curves[name] = {
                    min(iteration + 1, run.cfg.SOLVER.MAX_ITER) * step: value
                    for iteration, value in sorted(metrics[name].items())
                }
    return RunResult(run.recipe, run.ims_per_gpu, run.seed, step, failure, curves)


def measure(runs: Sequence[Run]) -> list[Cost]:
    """Cost of a step of every recipe as it ended, on the first images that the runs train on."""
    costs = []
    for ims_per_gpu in dict.fromkeys(run.ims_per_gpu for run in runs):
        models, batch = {}, None
        for run in runs:
            if run.ims_per_gpu != ims_per_gpu or run.recipe in models or not run.finished:
                continue
            cfg = run.cfg.clone()
            cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = ims_per_gpu, 0
            batch = batch or next(iter(build_train_loader(cfg)))
            models[run.recipe] = build_model(cfg).train()
            Checkpointer(models[run.recipe]).load(str(run.folder / "model_final.pth"))
        seconds = step_seconds(models, batch)
        costs += [
            Cost(
                name,
                ims_per_gpu,
                saved_bytes(model, batch) / 2**20 / ims_per_gpu,
                seconds[name] / ims_per_gpu,
            )
            for name, model in models.items()
        ]
    return costs


def report(
    output: Path,
    compared: dict[str, CfgNode],
    recipes: dict[str, CfgNode],
    held_out: str,
    results: Sequence[RunResult],
    costs: Sequence[Cost],
) -> None:
    """Write report.md, report.json, runs.csv and the plots, and print the tables."""
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
    }
    write_atomically(output / "report.json", json.dumps(content, indent=1) + "\n")
    write_atomically(output / "report.md", report_text(compared, recipes, held_out, results, costs))
    print(f"\n{ap_table(results, 'simple')}\n\n{cost_table(costs, 'simple')}\n")
    print(f"The report is {output / 'report.md'}.")


def report_text(
    compared: dict[str, CfgNode],
    recipes: dict[str, CfgNode],
    held_out: str,
    results: Sequence[RunResult],
    costs: Sequence[Cost],
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
    return f"""# Comparison of {names}

COCO AP on {markdown(held_out)} after training, mean ± sample standard deviation over
{len(seeds)} seed{"s" * (len(seeds) > 1)} ({", ".join(map(str, seeds))}), by images on a GPU.

{ap_table(results)}

![AP](ap.png)

![Curves](curves.png)

Cost of a step on the {device_name(first)}, of the trained models on the same images: what the
forward pass keeps for the backward pass, and the median time of both.

{cost_table(costs)}

![Cost](cost.png)

## What was held equal

Every setting of {names} but those below: model, heads, data, augmentation, optimizer
and schedule ({first.SOLVER.MAX_ITER} iterations of {first.SOLVER.IMS_PER_BATCH} images at a
learning rate of {first.SOLVER.BASE_LR:g}; for other numbers of images the learning rate follows in
proportion, and all see as many images). Runs of one seed see the same images in the same order.
{f"Shown beside, and not equal: {beside}." if beside else ""}

{differing}
{chr(10) + "## What did not finish" + chr(10) * 2 + failed if failed else ""}"""


def held_out(data: RunData) -> str:
    """What was evaluated on: the JSON files of folders, names of other sets."""
    files = {folder.name: folder.json_file for folder in data.folders}
    return ", ".join(files.get(name, name) for name in data.test)


def device_name(cfg: CfgNode) -> str:
    """What the runs trained on, in words."""
    if torch.device(cfg.MODEL.DEVICE).type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({torch.get_num_threads()} threads)"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", required=True, help="config files to compare")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        help="config files to show that differ in more",
    )
    parser.add_argument("--ims-per-gpu", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--quick", action="store_true", help="the first seed alone, and a quarter of the iterations"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and report")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each run")
    add_data_arguments(parser)
    add_overrides(parser)
    args = parser.parse_args()
    if args.quick:
        args.seeds = args.seeds[:1]
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least 1")
    return args


if __name__ == "__main__":
    run_command(main)
