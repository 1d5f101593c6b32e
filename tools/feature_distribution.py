"""Percentiles of a layer's values over training, without a norm, with BN and with GN.

By default of VGG-16's conv5_3, before its norm and ReLU (Wu & He 2018, figure 6); with --recipes,
of any module of detectors. What is interrupted goes on when this is run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from gn_det.engine.command import (
    RunOptions,
    add_data_arguments,
    add_overrides,
    at_least,
    reads_data,
    run_command,
)
from gn_det.engine.folders import check_same_settings, clear_half_written, study_folder
from gn_det.engine.resume import keep_data
from gn_det.engine.run import check_run
from gn_det.engine.schedule import resolve_schedule
from gn_det.engine.trainer import build_model, train

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger

from gn_det.classification.command import add_recipe_arguments, recipe_of
from gn_det.classification.networks import NORMS
from gn_det.config import dump_config, load_config
from gn_det.data.seeding import seed_generators
from gn_det.errors import InputError
from gn_det.files import make_folder, write_atomically
from gn_det.studies.paper.features import (
    feature_recorders,
    features_csv,
    features_file,
    find_module,
    plot_features,
    read_features,
)
from gn_det.studies.paper.sweep import run_sweep

HooksOf = Callable[[Path], Sequence[HookBase]]


def main() -> int:
    args = parse_arguments()
    hooks_of = partial(feature_recorders, module=args.module, records=args.records)
    train_all = train_detectors if args.recipes else train_classifiers
    failures = train_all(args, hooks_of)
    features = {
        name: read_features(features_file(args.output / "runs" / name, args.module, args.records))
        for name, failure in failures.items()
        if not failure
    }
    if not features:
        raise InputError("; ".join(f"{name}: {failure}" for name, failure in failures.items()))
    write_atomically(args.output / "features.csv", features_csv(features))
    plot_features(features, args.module, args.output / "features.png")
    print(f"{args.output}: features.csv, features.png")
    return 1 if any(failures.values()) else 0


def train_classifiers(args: argparse.Namespace, hooks_of: HooksOf) -> dict[str, str]:
    """Train a classifier for each norm; by its name, why it failed, or nothing."""
    if args.data is None:
        raise InputError("say what to learn: --data digits, generated or a folder, or --recipes")
    if args.opts or reads_data(args):
        raise InputError("--train, --val, their flags and config overrides go with --recipes")
    recipes = {norm: recipe_of(args, norm=norm) for norm in args.norms}
    for recipe in recipes.values():
        find_module(recipe.build(num_classes=1), args.module)
    trained = run_sweep(
        recipes,
        args.output,
        device=args.device,
        jobs=args.jobs,
        num_workers=args.num_workers,
        hooks_of=hooks_of,
    )
    return {t.norm: t.failure for t in trained}


def train_detectors(args: argparse.Namespace, hooks_of: HooksOf) -> dict[str, str]:
    """Train a detector for each recipe, one after the other; none of those that end failed."""
    if args.data is not None:
        raise InputError("--data is of classifiers; detectors take --train and --val")
    options = RunOptions.from_args(args)
    configs: dict[Path, CfgNode] = {}
    data = None
    for file in args.recipes:
        cfg = resolve_schedule(load_config(file, args.opts), options.world_size)
        cfg.SEED = args.seed
        folder = args.output / "runs" / Path(file).stem
        cfg.OUTPUT_DIR = str(folder)
        if folder in configs:
            raise InputError(f"two recipes are called {folder.name}, and would share a folder")
        data = check_run(cfg, options, args.output, data)
        find_module(build_model(cfg), args.module)
        configs[folder] = cfg
    with study_folder(args.output):
        for folder, cfg in configs.items():
            check_same_settings(folder, cfg)
        keep_data(args.output, data)
        data.write_copies()
        for name in ("detectron2", "gn_det"):
            setup_logger(name=name)
        for folder, cfg in configs.items():
            print(f"{folder.name}: seed {cfg.SEED}, {cfg.SOLVER.MAX_ITER} iterations")
            make_folder(folder)
            clear_half_written(folder)
            write_atomically(folder / "config.yaml", dump_config(cfg))
            if not (folder / "model_final.pth").exists():
                seed_generators(cfg.SEED)
                train(cfg, resume=True, more_hooks=hooks_of(folder))
    return {folder.name: "" for folder in configs}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and report")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["none", "BN", "GN"])
    parser.add_argument("--recipes", nargs="+", help="config files of detectors, in place of norms")
    parser.add_argument(
        "--module",
        default="backbone.features.conv5_3",
        help="whose output is recorded (default: %(default)s)",
    )
    parser.add_argument(
        "--records",
        **at_least(1),
        default=100,
        help="how often to record during training (default: %(default)s)",
    )
    add_data_arguments(parser)
    parser.add_argument("--jobs", **at_least(1), default=1, help="classifiers at a time")
    add_recipe_arguments(parser, varied=["norm"], required=False, network="vgg16")
    add_overrides(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
