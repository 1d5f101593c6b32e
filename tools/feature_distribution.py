"""Percentiles of a layer's values over training, without a norm, with BN and with GN.

By default of VGG-16's conv5_3, before its norm and ReLU (Wu & He 2018, figure 6); with --recipes,
of any module of detectors. What is interrupted goes on when this is run again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from detectron2.engine import HookBase
from detectron2.utils.logger import setup_logger

from gn_det.checkpoint import check_weights_exist
from gn_det.classification.command import add_recipe_arguments, recipe_of
from gn_det.classification.networks import NORMS
from gn_det.config import dump_config, load_config
from gn_det.data.datasets import register_folders
from gn_det.data.seeding import seed_generators
from gn_det.engine.command import run_command
from gn_det.engine.launch import check_processes
from gn_det.engine.run import locked
from gn_det.engine.run_data import check_config_data, check_start, set_data
from gn_det.engine.schedule import resolve_schedule
from gn_det.engine.trainer import Trainer
from gn_det.errors import InputError
from gn_det.studies.comparison.matrix import Run, check_folders
from gn_det.studies.paper.features import (
    feature_recorders,
    features_csv,
    features_file,
    plot_features,
    read_features,
)
from gn_det.studies.paper.sweep import run_sweep
from gn_det.utils import make_folder, write_atomically

HooksOf = Callable[[Path], Sequence[HookBase]]


def main() -> int:
    args = parse_arguments()
    if args.records < 1:
        raise InputError(f"--records {args.records}: at least 1")
    hooks_of = partial(feature_recorders, module=args.module, records=args.records)
    train = train_detectors if args.recipes else train_classifiers
    failures = train(args, hooks_of)
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
    if args.opts or args.train or args.val:
        raise InputError(f"--train, --val and {args.opts} are of --recipes, and there are none")
    recipes = {norm: recipe_of(args, norm=norm) for norm in args.norms}
    return {t.norm: t.failure for t in run_sweep(recipes, args, hooks_of)}


def train_detectors(args: argparse.Namespace, hooks_of: HooksOf) -> dict[str, str]:
    """Train a detector for each recipe, one after the other; none of those that end failed."""
    if args.data is not None:
        raise InputError("--data is of classifiers; detectors take --train and --val")
    runs = []
    for file in args.recipes:
        cfg = resolve_schedule(load_config(file, args.opts), 1)
        cfg.SEED = args.seed
        cfg.OUTPUT_DIR = str(args.output / "runs" / Path(file).stem)
        amp = cfg.SOLVER.AMP.ENABLED
        check_processes(cfg.MODEL.DEVICE, args, cfg.SOLVER.IMS_PER_BATCH, amp=amp)
        check_weights_exist(cfg.MODEL.WEIGHTS)
        check_start(cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT)
        data = check_config_data(args, cfg)
        set_data(cfg, data)
        runs.append(Run(Path(file).stem, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg))
    with locked(args.output):
        check_folders(runs)
        register_folders(data.folders)
        for name in ("detectron2", "gn_det"):
            setup_logger(name=name)
        for run in runs:
            print(f"{run.recipe}: seed {run.seed}, {run.cfg.SOLVER.MAX_ITER} iterations")
            make_folder(run.folder)
            write_atomically(run.folder / "config.yaml", dump_config(run.cfg))
            if not (run.folder / "model_final.pth").exists():
                seed_generators(run.seed)
                trainer = Trainer(run.cfg)
                trainer.register_hooks(hooks_of(run.folder))
                trainer.resume_or_load(resume=True)
                trainer.train()
    return {run.recipe: "" for run in runs}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Config overrides for the --recipes, KEY VALUE ..., come last."
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of runs and report")
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["none", "BN", "GN"])
    parser.add_argument("--recipes", nargs="+", help="config files of detectors, in place of norms")
    parser.add_argument(
        "--module",
        default="backbone.features.conv5_3",
        help="whose output is recorded (default: %(default)s)",
    )
    parser.add_argument("--records", type=int, default=100, help="over the training")
    for flag in ("--train", "--val"):
        parser.add_argument(flag, nargs=2, metavar=("JSON", "IMAGES_DIR"), help="of --recipes")
    parser.add_argument("--jobs", type=int, default=1, help="classifiers at a time")
    add_recipe_arguments(parser, varied=["norm"], required=False, network="vgg16")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    parser.set_defaults(num_gpus=1, num_machines=1, eval_only=False, skip_bad_images=False)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
