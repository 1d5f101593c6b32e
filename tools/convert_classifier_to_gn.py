"""Convert the BN layers of a classifier to GN, their γ, β fitted on training pictures.

Convolutions stay. The output has the classifier, its backbone for detectors, and a report: the
error of each norm, and the validation error with BN, with γ, β copied, fitted, and fine-tuned.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
import torch
from torch import Tensor
from torch.utils.data import Dataset

from gn_det.classification.command import add_device_argument
from gn_det.classification.datasets import load_pictures
from gn_det.classification.networks import Classifier
from gn_det.classification.training import (
    ClassifierRecipe,
    error_rate,
    read_classifier,
    train_classifier,
    write_backbone_of,
)
from gn_det.data.seeding import seed_generators
from gn_det.engine.command import run_command
from gn_det.engine.launch import check_device
from gn_det.errors import InputError
from gn_det.studies.conversion.report import conversion_report, plot_conversion, stage_table
from gn_det.studies.conversion.stages import Conversion, convert_in_stages
from gn_det.utils import make_folder, whole_file, write_atomically
from gn_det.version import __version__

METRIC = "validation error (%)"
WEIGHTS = "model_gn.pth"


def main() -> None:
    args = parse_arguments()
    device = check_device(args.device)
    recipe, classifier = read_classifier(args.classifier)
    groups = {"num_groups": args.num_groups, "channels_per_group": args.channels_per_group}
    gn_recipe = replace(
        recipe, norm="GN", **groups, epochs=args.fine_tune, lr=args.lr, schedule="cosine"
    )
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise InputError(f"{args.output} is there and no empty folder; name another")
    make_folder(args.output)
    pictures, held_out = load_pictures(recipe.data, recipe.size)
    batches = calibration_batches(pictures, args.calibration_pictures, recipe.seed)

    def keep(model: Classifier, conversion: Conversion) -> None:
        with whole_file(args.output / WEIGHTS) as file:
            torch.save({"model": model.state_dict()}, file)
        write_backbone_of(args.output / "backbone.pth", gn_recipe, model)
        write_report(args, recipe, conversion)

    def fine_tune(model: Classifier) -> None:
        folder = args.output / "fine_tuned"
        make_folder(folder)
        weights = str(args.output / WEIGHTS)
        train_classifier(gn_recipe, folder, args.device, weights=weights)
        model.load_state_dict(read_classifier(folder)[1].state_dict())

    conversion = convert_in_stages(
        classifier.to(device),
        batches,
        Classifier.scores,
        evaluate=lambda model: error_rate(model, held_out),
        keep=keep,
        fine_tune=fine_tune if args.fine_tune else None,
        **groups,
    )
    write_report(args, recipe, conversion)
    print(f"\n{conversion.calibration}\n\n{stage_table(METRIC, conversion.metric, 'simple')}\n")
    print(f"{args.output}: report.md, and for detectors, calibrated, backbone.yaml")
    if args.fine_tune:
        print(f"{args.output / 'fine_tuned'}: backbone.yaml, fine-tuned")


def calibration_batches(pictures: Dataset, number: int, seed: int) -> list[Tensor]:
    """Training pictures, augmented as in training, 32 at a time; by the seed alone."""
    if not 1 <= number <= len(pictures):
        raise InputError(f"--calibration-pictures {number}: from 1 to {len(pictures)}")
    seed_generators(seed)
    chosen = torch.randperm(len(pictures))[:number].tolist()
    return [*torch.stack([pictures[index]["image"] for index in chosen]).split(32)]


def write_report(
    args: argparse.Namespace, recipe: ClassifierRecipe, conversion: Conversion
) -> None:
    """Write report.md, report.json and conversion.png."""
    calibration, errors = conversion.calibration, conversion.metric
    how = (
        f"γ, β were fitted on {args.calibration_pictures} training pictures of {recipe.data} "
        f"(seed {recipe.seed}) to the BN layers of {args.classifier}, and the error is that of "
        "the held-out ones. [backbone.yaml](backbone.yaml) is for detectors that start from what "
        "was calibrated."
    )
    if args.fine_tune:
        how += (
            f" Fine-tuning takes {args.fine_tune} epochs at a learning rate of {args.lr:g}; "
            "[fine_tuned/backbone.yaml](fine_tuned/backbone.yaml) is for what comes of it."
        )
    plot_conversion(calibration, args.output / "conversion.png", METRIC, errors)
    source = f"{recipe.network} on {recipe.data}"
    text = conversion_report(source, how, calibration, METRIC, errors)
    write_atomically(args.output / "report.md", text)
    content = {
        "gn_det": __version__,
        "classifier": str(args.classifier),
        "recipe": asdict(recipe),
        "calibration_pictures": args.calibration_pictures,
        "fine_tune": args.fine_tune,
        "lr": args.lr,
        "stages": errors,
        "calibration": asdict(calibration),
    }
    write_atomically(args.output / "report.json", json.dumps(content, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classifier", type=Path, help="folder of train_classifier.py, with BN")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument(
        "--calibration-pictures", type=int, default=64, help="to fit γ, β on; default: %(default)s"
    )
    parser.add_argument("--num-groups", type=int, help="of GN (default: 32)")
    parser.add_argument("--channels-per-group", type=int, help="in place of --num-groups")
    parser.add_argument(
        "--fine-tune", type=int, default=0, metavar="EPOCHS", help="then train for so many epochs"
    )
    parser.add_argument(
        "--lr",
        type=float,
        default=0.01,
        help="of fine-tuning at 32 pictures a step (default: %(default)s, a tenth of the paper's)",
    )
    add_device_argument(parser)
    args = parser.parse_args()
    if args.fine_tune < 0:
        parser.error(f"--fine-tune {args.fine_tune}: at least 0")
    return args


if __name__ == "__main__":
    run_command(main)
