"""Compare norms: train a matrix of recipes, images per GPU and seeds, and report AP and cost.

The recipes must be equal in all but the norm. With --lrs each has the learning rate that is best on
a held-out quarter of the training set. What is interrupted goes on when this is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gn_det.engine import trainer
from gn_det.engine.command import (
    RunOptions,
    above_zero,
    add_data_arguments,
    add_overrides,
    at_least,
    run_command,
)
from gn_det.engine.folders import study_folder
from gn_det.engine.resume import keep_data
from gn_det.engine.run import check_run
from gn_det.engine.run_data import RunData
from gn_det.engine.schedule import rescale_schedule, resolve_schedule

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import setup_logger

from gn_det.config import load_config
from gn_det.data.coco import read_coco
from gn_det.data.datasets import register_folders
from gn_det.data.facts import facts_of
from gn_det.errors import InputError
from gn_det.files import write_atomically
from gn_det.plots.figures import deviation
from gn_det.studies.comparison.cost import costs_of
from gn_det.studies.comparison.matrix import Run, check_comparable, check_folders, run_all
from gn_det.studies.comparison.outcome import Comparison, Outcome
from gn_det.studies.comparison.parts import hold_out_a_quarter, write_part
from gn_det.studies.comparison.rates import Scores, best_rates, scores_of
from gn_det.studies.comparison.report import write_report, write_summary
from gn_det.studies.comparison.results import TASKS, RunResult, result_of, results_of
from gn_det.studies.conversion.backbone import convert_backbone, settings_of, source_of
from gn_det.studies.recommendation.measured import Row, read_rows, rows_text
from gn_det.version import commit


def main() -> int:
    args = parse_arguments()
    recipes = read_recipes(args.recipes, args.beside, args.opts)
    for recipe in recipes.values():
        if len(args.lrs) == 1:  # nothing to choose
            recipe.SOLVER.BASE_LR = args.lrs[0]
    check_comparable({Path(file).stem: recipes[Path(file).stem] for file in args.recipes})
    check_beginnings(recipes)
    options = RunOptions.from_args(args)
    data = checked(matrix(at_length(recipes, args), args, args.output), options, args.output)
    forget(data)
    if len(args.lrs) > 1 or args.parts not in ([], ["all"]):
        training_set(data)
    if not data.test:
        raise InputError(
            "the runs have no held-out set: give --val JSON IMAGES_DIR, or name one in the recipes"
        )
    with study_folder(args.output):
        keep_data(args.output, data)
        data.write_copies()
        outcomes = []
        for comparison in comparisons(args, options, data):
            same_data = data if comparison.options == options else None
            outcomes.append(compare(comparison, recipes, args, same_data))
            if args.train:
                write_measured(args, recipes, outcomes[-1:])
            if len(outcomes) > 1:
                write_summary(args.output, outcomes)
    return 1 if any(result.failure for o in outcomes for result in o.results) else 0


def comparisons(args: argparse.Namespace, options: RunOptions, data: RunData) -> list[Comparison]:
    """One for each part of the training set and number of steps; its data are written."""
    found = []
    for part in args.parts or ["all"]:
        for steps in args.steps or [None]:
            # As many folders as may come, so that a comparison can grow.
            names = [f"{part}pictures"] * bool(args.parts) + [f"{steps}steps"] * bool(args.steps)
            names += ["quick"] * args.quick
            folder = args.output / "-".join(names)
            pictures, of_part = None, options
            if part != "all":
                json_file, images = training_set(data)
                pictures, part_file = int(part), folder / "data" / "train.json"
                write_part(json_file, pictures, part_file)
                of_part = replace(options, train=(str(part_file), images))
            if len(args.lrs) > 1:
                divided = training_set(data)[0] if pictures is None else str(part_file)
                hold_out_a_quarter(divided, *quarters_in(folder))
            found.append(Comparison(folder, of_part, pictures, steps))
    return found


def quarters_in(folder: Path) -> tuple[Path, Path]:
    """The JSON of the three quarters to train on while learning rates are chosen, and the other."""
    return folder / "rates" / "data" / "train.json", folder / "rates" / "data" / "val.json"


def training_set(data: RunData) -> tuple[str, str]:
    """The normalised JSON and the folder of images of the set that is divided."""
    folders = [folder for folder in data.folders if folder.name in data.train]
    if len(folders) != 1:
        raise InputError("--lrs and --parts divide one training set: name it with --train")
    return folders[0].json_file, folders[0].image_root


def compare(
    comparison: Comparison,
    recipes: dict[str, CfgNode],
    args: argparse.Namespace,
    data: RunData | None = None,
) -> Outcome:
    """Train the matrix of a comparison, and report it.

    Args:
        comparison: which.
        recipes: by name.
        args: of the command line.
        data: where its data was checked already.
    """
    folder, options = comparison.folder, comparison.options
    recipes = at_length(recipes, args, comparison.steps)
    runs = matrix(recipes, args, folder)
    data = checked(runs, options, folder, data)
    data.write_copies()
    facts = facts_of(read_coco(training_set(data)[0])) if args.train else None
    recipes = with_prepared_weights(recipes, runs, args.output / "weights", args.distill)
    scores = rates(comparison, recipes, args, data) if len(args.lrs) > 1 else {}
    runs = matrix(recipes, args, folder, best_rates(scores))
    data = checked(runs, options, folder, data)
    check_folders(runs)
    results = trained(runs, args)
    costs = costs_of(runs)
    compared = {Path(file).stem: recipes[Path(file).stem] for file in args.recipes}
    write_report(folder, compared, recipes, held_out(data), results, costs, scores)
    forget(data)
    if failed := sum(bool(result.failure) for result in results):
        print(f"{failed} runs failed")
    return Outcome(comparison, runs, results, facts)


def checked(
    runs: Sequence[Run], options: RunOptions, folder: Path, data: RunData | None = None
) -> RunData:
    """Check everything that the runs need, and register their data; see :func:`check_run`."""
    for run in runs:
        data = check_run(run.cfg, options, folder, data)
    return data


def trained(runs: Sequence[Run], args: argparse.Namespace) -> list[RunResult]:
    """What the runs reached; those that are not finished are trained."""
    failures = run_all(runs, Path(__file__).with_name("train_net.py"), args.jobs, args.num_gpus)
    return [result_of(run, failures.get(run.name, "")) for run in runs]


def rates(
    comparison: Comparison, recipes: dict[str, CfgNode], args: argparse.Namespace, data: RunData
) -> Scores:
    """AP of every recipe at every learning rate of --lrs, on a quarter of the training set.

    The other three quarters are trained on, with the first seed.
    """
    _, images = training_set(data)
    folder = comparison.folder / "rates"
    train, val = quarters_in(comparison.folder)
    options = replace(comparison.options, train=(str(train), images), val=(str(val), images))
    runs: list[Run] = []
    for lr in args.lrs:
        at_lr = {(name, n): lr for name in recipes for n in args.ims_per_gpu}
        runs += matrix(recipes, args, folder, at_lr, args.seeds[:1])
    for run in runs:
        run.cfg.TEST.EVAL_PERIOD = 0
    forget(data)
    divided = checked(runs, options, folder)
    divided.write_copies()
    check_folders(runs)
    reached: dict[float, list[RunResult]] = {}
    for run, result in zip(runs, trained(runs, args), strict=True):
        reached.setdefault(run.lr, []).append(result)
    forget(divided)
    register_folders(data.folders)
    return scores_of(reached)


def with_prepared_weights(
    recipes: dict[str, CfgNode], runs: Sequence[Run], folder: Path, steps: int
) -> dict[str, CfgNode]:
    """Recipes whose MODEL.TIMM.WEIGHTS end in _calibrated or _distilled, with weights made now.

    They are made from the weights without that ending, on the pictures that the runs train on.
    """
    changed = {}
    for name in ("gn_det.injection.distill", "gn_det.studies"):
        setup_logger(name=name)
    for name, recipe in recipes.items():
        weights, stage = source_of(recipe.MODEL.TIMM.WEIGHTS)
        if stage:
            cfg = next(run.cfg for run in runs if run.recipe == name).clone()
            cfg.SOLVER.IMS_PER_BATCH = recipe.SOLVER.IMS_PER_BATCH
            settings = json.dumps(settings_of(cfg, steps)).encode()
            made = folder / f"{Path(weights).stem}-{hashlib.sha256(settings).hexdigest()[:8]}"
            if not (made / f"{stage}.pth").exists():
                print(f"{made}: γ, β of GN are fitted, then {steps} steps of distillation")
            convert_backbone(cfg, made, steps)
            recipe = recipe.clone()
            recipe.MODEL.TIMM.WEIGHTS = str((made / f"{stage}.pth").resolve())
        changed[name] = recipe
    return changed


def check_beginnings(recipes: dict[str, CfgNode]) -> None:
    """Refuse weights that are not there and recipes that cannot be built, before any trains."""
    for name, recipe in recipes.items():
        weights, _ = source_of(recipe.MODEL.TIMM.WEIGHTS)
        if weights not in ("", "timm") and not Path(weights).is_file():
            raise InputError(
                f"{name}: MODEL.TIMM.WEIGHTS {weights} does not exist; `make {weights}` makes "
                "weights/lite0.pth, and tools/convert_weights.py --timm others"
            )
        on_cpu = recipe.clone()
        on_cpu.MODEL.DEVICE = "cpu"
        try:
            trainer.build_model(on_cpu, weights_follow=True)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error


def forget(data: RunData) -> None:
    """Unregister the data sets of a comparison, whose names the next one takes."""
    for folder in data.folders:
        if folder.name in DatasetCatalog:
            DatasetCatalog.remove(folder.name)
            MetadataCatalog.remove(folder.name)


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


def matrix(
    recipes: dict[str, CfgNode],
    args: argparse.Namespace,
    folder: Path,
    lrs: Mapping[tuple[str, int], float] | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Run]:
    """Every run, those of one seed beside each other.

    Args:
        recipes: by name.
        args: of the command line.
        folder: the runs are below its ``runs/``.
        lrs: learning rates for the reference, by recipe and images per GPU, where there are such.
        seeds: in place of those of the command line.
    """
    runs = []
    for seed in seeds or args.seeds:
        for ims_per_gpu in args.ims_per_gpu:
            for name, recipe in recipes.items():
                cfg = recipe.clone()
                cfg.SOLVER.IMS_PER_GPU = ims_per_gpu
                lr = (lrs or {}).get((name, ims_per_gpu))
                cfg.SOLVER.BASE_LR = cfg.SOLVER.BASE_LR if lr is None else lr
                cfg = resolve_schedule(cfg, args.num_gpus)
                cfg.SEED = seed
                run = Run(name, ims_per_gpu, seed, cfg, lr)
                cfg.OUTPUT_DIR = str(folder / "runs" / run.name)
                runs.append(run)
    return runs


def at_length(
    recipes: dict[str, CfgNode], args: argparse.Namespace, steps: int | None = None
) -> dict[str, CfgNode]:
    """Recipes with the schedule in so many iterations, None for their own; a quarter of --quick."""
    changed = {}
    for name, recipe in recipes.items():
        iterations = steps or recipe.SOLVER.MAX_ITER
        changed[name] = rescale_schedule(
            recipe, max(1, iterations // 4) if args.quick else iterations
        )
    return changed


def write_measured(
    args: argparse.Namespace, recipes: dict[str, CfgNode], outcomes: Sequence[Outcome]
) -> None:
    """Write measured.csv, which tools/recommend.py reads; rows of other comparisons stay."""
    file = args.output / "measured.csv"
    rows = []
    for outcome in outcomes:
        first = {(run.recipe, run.ims_per_gpu): run.cfg for run in reversed(outcome.runs)}
        for (recipe, n), cfg in first.items():
            runs = results_of(outcome.results, recipe, n)
            box, mask = ([ap for run in runs if (ap := run.ap(task)) is not None] for task in TASKS)
            if box:
                weights = recipes[recipe].MODEL.WEIGHTS or recipes[recipe].MODEL.TIMM.WEIGHTS
                row = Row(
                    data=name_of_data(args.train[0]),
                    **asdict(outcome.facts),
                    recipe=recipe,
                    config=next(f for f in args.recipes + args.beside if Path(f).stem == recipe),
                    overrides=shlex.join(args.opts),
                    weights=Path(weights).stem or "none",
                    ims_per_batch=cfg.SOLVER.IMS_PER_BATCH * cfg.SOLVER.ACCUMULATE_STEPS,
                    steps=cfg.SOLVER.MAX_ITER,
                    lr=cfg.SOLVER.BASE_LR,
                    box_ap=statistics.mean(box),
                    box_deviation=deviation(box),
                    mask_ap=statistics.mean(mask) if mask else None,
                    mask_deviation=deviation(mask) if mask else None,
                    seeds=len(box),
                    commit=commit() or "",
                )
                rows.append(row)
    there = read_rows(file) if file.exists() else []
    anew = {row.key for row in rows}
    write_atomically(file, rows_text([*(row for row in there if row.key not in anew), *rows]))


def name_of_data(json_file: str) -> str:
    """The name of the folder of a data set, whose JSON may be below annotations/, as COCO's is."""
    folder = Path(json_file).absolute().parent
    return (folder.parent if folder.name == "annotations" else folder).name


def held_out(data: RunData) -> str:
    """What was evaluated on: the JSON files of folders, names of other sets."""
    files = {folder.name: folder.json_file for folder in data.folders}
    return ", ".join(files.get(name, name) for name in data.test)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", required=True, help="config files to compare")
    parser.add_argument(
        "--beside",
        nargs="+",
        default=[],
        help="config files to show that differ in more",
    )
    parser.add_argument("--ims-per-gpu", nargs="+", **at_least(1), default=[1, 2])
    parser.add_argument("--seeds", nargs="+", **at_least(0), default=[0, 1, 2])
    parser.add_argument(
        "--quick", action="store_true", help="the first seed alone, and a quarter of the iterations"
    )
    parser.add_argument(
        "--lrs",
        nargs="+",
        **above_zero(),
        default=[],
        metavar="LR",
        help="learning rates for the reference; each recipe has the one that is best on a quarter "
        "of the training set (default: that of the recipe)",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        type=part_of,
        default=[],
        metavar="N",
        help="numbers of training pictures, a comparison in a folder of its own for each; all for "
        "all (default)",
    )
    parser.add_argument(
        "--steps",
        nargs="+",
        **at_least(1),
        default=[],
        metavar="N",
        help="iterations of the reference, a comparison for each (default: those of the recipe)",
    )
    parser.add_argument(
        "--distill",
        **at_least(1),
        default=400,
        metavar="N",
        help="steps for recipes whose MODEL.TIMM.WEIGHTS end in _distilled; default: %(default)s",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and report")
    parser.add_argument("--jobs", **at_least(1), default=1, help="runs at a time")
    parser.add_argument("--num-gpus", **at_least(1), default=1, help="GPUs of each run")
    add_data_arguments(parser)
    add_overrides(parser)
    args = parser.parse_args()
    for key in ("ims_per_gpu", "lrs", "parts", "seeds", "steps"):
        setattr(args, key, [*dict.fromkeys(getattr(args, key))])
    if args.quick:
        args.seeds = args.seeds[:1]
    return args


def part_of(text: str) -> str:
    """An argparse type: a number of pictures, or all."""
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text} is neither a number of pictures nor all")
    return text


if __name__ == "__main__":
    run_command(main)
