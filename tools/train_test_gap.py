"""What BN makes of held-out images in training and in testing, beside GN, and under shifts.

In training BN normalizes by the batch, in testing by running averages of the training set; where
the images shift, the two differ. GN computes the same in both (Wu & He 2018, section 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from gn_det.engine.command import at_least, run_command
from gn_det.engine.folders import new_folder
from gn_det.engine.launch import check_device

import torch

from gn_det.classification.command import CPU, add_device_argument
from gn_det.classification.datasets import load_images
from gn_det.classification.training import read_classifier
from gn_det.errors import InputError
from gn_det.files import write_atomically
from gn_det.studies.paper.shifts import Errors, gap_csv, gap_table, plot_gap, shifted_errors


def main() -> None:
    args = parse_arguments()
    device = check_device(args.device, CPU)
    with new_folder(args.output):
        errors = errors_of(args.classifiers, args.batch_sizes, device)
    write_atomically(args.output / "gap.csv", gap_csv(errors))
    plot_gap(errors, args.output / "gap.png")
    print(f"\nError in percent:\n\n{gap_table(errors)}\n\n{args.output}: gap.csv, gap.png")


def errors_of(
    classifiers: Sequence[Path], batch_sizes: Sequence[int], device: torch.device
) -> dict[str, Errors]:
    """Errors of each classifier by its network and norm, see :func:`shifted_errors`."""
    errors = {}
    sets = set()
    for folder in classifiers:
        recipe, classifier = read_classifier(folder)
        name = f"{recipe.network} with {recipe.norm}"
        if name in errors:
            raise InputError(f"two of the classifiers are a {name}; give one of each norm")
        print(f"{folder}: {name}, trained on {recipe.data} with seed {recipe.seed}")
        images = (recipe.data, recipe.size, recipe.max_objects)
        sets.add(images)
        if len(sets) > 1:
            raise InputError(
                f"the classifiers learnt different images, (data, size, max_objects): {sets}"
            )
        _, held_out = load_images(*images)
        errors[name] = shifted_errors(classifier.to(device), held_out, batch_sizes)
    return errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "classifiers", nargs="+", type=Path, help="folders of train_classifier.py, or of a sweep"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of table and image")
    parser.add_argument("--batch-sizes", nargs="+", **at_least(1), default=[1, 2, 4, 8, 16, 32])
    add_device_argument(parser)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
