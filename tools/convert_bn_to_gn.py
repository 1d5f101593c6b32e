"""Convert the BN layers of a trained detector or classifier to GN, γ, β fitted on training images.

Then the converted backbone learns the features of that with BN. The output has the weights, what
loads and trains them, and a report: the error of each norm and of each level of features, and AP or
validation error with BN, with γ, β copied, fitted, distilled and fine-tuned. A timm backbone alone
(--backbone) becomes calibrated.pth and distilled.pth, for MODEL.TIMM.WEIGHTS. A conversion that was
interrupted goes on when the command is repeated.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from gn_det.engine.command import (
    RunOptions,
    above_zero,
    add_data_arguments,
    add_overrides,
    at_least,
    reads_data,
    run_command,
)
from gn_det.engine.folders import new_folder, study_folder
from gn_det.engine.launch import check_device
from gn_det.engine.process import set_up_process
from gn_det.engine.resume import keep_data
from gn_det.engine.run import check_run
from gn_det.engine.schedule import resolve_schedule

from detectron2.config import CfgNode

from gn_det.classification.command import CPU, default_device
from gn_det.config import load_config
from gn_det.errors import InputError
from gn_det.modeling.with_gn import puts_gn_into_the_backbone
from gn_det.studies.conversion.backbone import CALIBRATION_IMAGES, SETTINGS, convert_backbone
from gn_det.studies.conversion.classifier import METRIC, convert_classifier
from gn_det.studies.conversion.detector import convert_detector
from gn_det.studies.conversion.report import stage_table
from gn_det.studies.conversion.settings import UNFINISHED, keep_settings, seed_in
from gn_det.studies.conversion.stages import Conversion


def main() -> None:
    args = parse_arguments()
    begun = args.output / (SETTINGS if args.backbone else UNFINISHED)
    with study_folder(args.output) if begun.exists() else new_folder(args.output):
        if args.backbone:
            from_backbone(args, begun)
            return
        if args.classifier:
            conversion, metric = from_classifier(args, begun), METRIC
        else:
            conversion, metric = from_config(args, begun)
        begun.unlink()
    print(f"\n{conversion.calibration}\n")
    if conversion.metric:
        print(f"{stage_table(metric, conversion.metric, 'simple')}\n")
    loader = "backbone.yaml, for detectors" if args.classifier else "config.yaml"
    print(f"{args.output}: model_gn.pth, {loader}, report.md")


def from_backbone(args: argparse.Namespace, begun: Path) -> None:
    """Convert the timm backbone of --backbone, and say how to use what it became."""
    if args.fine_tune:
        raise InputError("--fine-tune: a backbone alone is trained with its detector, by train_net")
    if not args.distill:
        raise InputError("--distill 0: a backbone alone learns BN's features in at least 1 step")
    cfg = read_config(args, args.backbone)
    if not cfg.MODEL.BACKBONE.NAME.startswith("build_timm_"):
        raise InputError(f"{args.backbone}: {cfg.MODEL.BACKBONE.NAME} is no backbone of timm")
    if not puts_gn_into_the_backbone(cfg):
        raise InputError(
            f"{args.backbone} has no GN in its backbone: set MODEL.META_ARCHITECTURE to "
            "GNGeneralizedRCNN, or another with GN, and have backbone in MODEL.GN.SITES"
        )
    if not cfg.MODEL.TIMM.WEIGHTS:
        raise InputError("there are no weights to convert: set MODEL.TIMM.WEIGHTS")
    begin(args, cfg, begun)
    convert_backbone(cfg, args.output, args.distill, args.calibration_images)
    overrides = shlex.join([*args.opts, "MODEL.TIMM.WEIGHTS", str(args.output / "distilled.pth")])
    print(
        f"{args.output}: calibrated.pth, distilled.pth, report.md. {args.backbone} takes them by "
        f"{overrides}"
    )


def from_config(args: argparse.Namespace, begun: Path) -> tuple[Conversion, str]:
    """Convert the detector of --config-file."""
    cfg = read_config(args, args.config_file)
    if not cfg.MODEL.WEIGHTS:
        raise InputError("there are no weights to convert: set MODEL.WEIGHTS")
    begin(args, cfg, begun)
    keep_settings(begun, {"config": cfg, "seed": cfg.SEED, **steps_of(args)})
    title = Path(args.config_file).name
    return convert_detector(
        cfg, title, args.output, args.calibration_images, args.distill, args.fine_tune
    )


def read_config(args: argparse.Namespace, file: str) -> CfgNode:
    """The config of a detector, for as many GPUs as are asked for."""
    of_classifiers = ("num_groups", "channels_per_group", "lr", "device")
    given = [f"--{n.replace('_', '-')}" for n in of_classifiers if getattr(args, n) is not None]
    if given:
        raise InputError(
            f"{', '.join(given)}: a detector's config says it, in MODEL.GN.NUM_GROUPS, "
            "MODEL.GN.CHANNELS_PER_GROUP, SOLVER.BASE_LR and MODEL.DEVICE"
        )
    world_size = RunOptions.from_args(args).world_size
    cfg = resolve_schedule(load_config(file, args.opts), world_size)
    if cfg.MODEL.GN.HAND_OVER_STEPS:
        raise InputError(
            f"{file} hands over from BN by MODEL.GN.HAND_OVER_STEPS, which needs no converted "
            "weights: train it, or set HAND_OVER_STEPS to 0"
        )
    return cfg


def steps_of(args: argparse.Namespace) -> dict[str, int]:
    """What a conversion that goes on must have in common with the one that was interrupted."""
    return {key: getattr(args, key) for key in ("calibration_images", "distill", "fine_tune")}


def begin(args: argparse.Namespace, cfg: CfgNode, begun: Path) -> None:
    """Check the data and write it down, set the process up, and settle the seed of the config."""
    if cfg.SEED < 0 and begun.exists():
        cfg.SEED = seed_in(begun)
    data = check_run(cfg, RunOptions.from_args(args), args.output)
    keep_data(args.output, data)
    data.write_copies()
    cfg.SEED = set_up_process(args.output, cfg.SEED, cfg.CUDNN_BENCHMARK)


def from_classifier(args: argparse.Namespace, begun: Path) -> Conversion:
    """Convert the classifier of --classifier."""
    if args.opts or reads_data(args):
        raise InputError("--train, --val, their flags and overrides go with --config-file")
    device = args.device or default_device()
    check_device(device, CPU)
    source = {"classifier": str(args.classifier), "lr": args.lr}
    groups = {"num_groups": args.num_groups, "channels_per_group": args.channels_per_group}
    keep_settings(begun, {**source, **groups, **steps_of(args)})
    return convert_classifier(
        args.classifier,
        args.output,
        args.calibration_images,
        args.distill,
        args.fine_tune,
        lr=0.01 if args.lr is None else args.lr,
        device=device,
        **groups,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Config overrides, KEY VALUE ..., come last: MODEL.WEIGHTS (of a --backbone "
        "MODEL.TIMM.WEIGHTS) names the weights to convert, MODEL.GN.NUM_GROUPS or "
        "CHANNELS_PER_GROUP the groups.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config-file", help="config file of a detector with BN")
    source.add_argument("--backbone", help="config of a detector whose timm backbone to convert")
    source.add_argument("--classifier", type=Path, help="folder of train_classifier.py, with BN")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--calibration-images",
        **at_least(1),
        help=f"to fit γ, β on; default: 64, of --backbone {CALIBRATION_IMAGES}",
    )
    parser.add_argument(
        "--distill",
        **at_least(0),
        default=400,
        metavar="N",
        help="steps in which the backbone learns the features of that with BN, 0 for none; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--fine-tune",
        **at_least(0),
        default=0,
        metavar="N",
        help="then train for N iterations (a detector) or epochs (a classifier)",
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--num-groups", type=int, help="groups of GN, for --classifier (default: 32)"
    )
    parser.add_argument(
        "--channels-per-group", type=int, help="channels of each group, in place of --num-groups"
    )
    parser.add_argument(
        "--lr",
        **above_zero(),
        help="learning rate of fine-tuning at 32 images per step, for --classifier (default: 0.01)",
    )
    parser.add_argument("--device", help="device for --classifier (default: a GPU if there is one)")
    add_overrides(parser)
    args = parser.parse_args()
    if args.calibration_images is None:
        args.calibration_images = CALIBRATION_IMAGES if args.backbone else 64
    return args


if __name__ == "__main__":
    run_command(main)
