"""Train a ResNet to tell the objects of a COCO-format data set apart, as a detector's start.

It writes a backbone that MODEL.WEIGHTS loads, and beside it, as JSON, how it was trained and the
settings that a detector has to share with it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
import torch

from gn_det.data.object_crops import ObjectCrops
from gn_det.engine.classifier import (
    NORMS,
    PIXEL_MEAN,
    PIXEL_STD,
    accuracy,
    build_classifier,
    train_classifier,
)
from gn_det.engine.command import run_command
from gn_det.errors import InputError
from gn_det.utils import make_folder, whole_file, write_atomically


def main() -> None:
    args = parse_arguments()
    if args.output.exists():
        raise InputError(f"{args.output} exists; remove it, or name another")
    make_folder(args.output.parent)
    torch.manual_seed(args.seed)
    crops = ObjectCrops(*args.train, args.size, args.seed)
    held_out = ObjectCrops(*args.val, args.size)
    if held_out.classes != crops.classes:
        raise InputError(f"--val has the classes {held_out.classes}, --train {crops.classes}")
    model = build_classifier(args.depth, args.norm, len(crops.classes))
    train_classifier(
        model, crops, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, seed=args.seed
    )
    settings = {
        "norm": args.norm,
        "depth": args.depth,
        "classes": crops.classes,
        "pictures": len(crops),
        "size": args.size,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "held-out accuracy": accuracy(model, held_out),
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": PIXEL_MEAN,
        "MODEL.PIXEL_STD": PIXEL_STD,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }
    print(f"{args.norm}: held-out accuracy {settings['held-out accuracy']:.1%}")
    write_atomically(args.output.with_suffix(".json"), json.dumps(settings, indent=2) + "\n")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("linear.")}
    with whole_file(args.output) as file:
        # Detectron2 then finds the backbone's place in a detector by the ends of the names.
        torch.save({"model": weights, "matching_heuristics": True}, file)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="file of the weights, .pth")
    for flag in ("--train", "--val"):
        parser.add_argument(flag, nargs=2, metavar=("JSON", "IMAGES_DIR"), required=True)
    parser.add_argument("--norm", choices=NORMS, required=True)
    parser.add_argument("--depth", type=int, choices=(18, 34, 50, 101), default=18)
    parser.add_argument("--size", type=int, default=48, help="side of the pictures in pixels")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.1, help="for 32 images a step")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
