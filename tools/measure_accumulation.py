"""Measure how far the gradient of accumulated batches is from that of one batch, and why.

Pairs of pictures of a training go through the model in one batch and in two of one picture each,
while one cause of the difference after the other is taken away. A second table shows how far
padding changes what the model makes of a picture.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from gn_det.checkpoint import Checkpointer, check_weights_exist
from gn_det.config import load_config
from gn_det.data.datasets import register_folders
from gn_det.data.seeding import seed_generators
from gn_det.engine.command import run_command
from gn_det.engine.run_data import check_data, set_data
from gn_det.studies.accumulation import (
    accumulation_rows,
    is_padded,
    padding_rows,
    training_pairs,
)
from gn_det.utils import make_folder, write_atomically


def main() -> None:
    args = parse_args()
    cfg = load_config(args.config_file, args.opts)
    cfg.SEED = max(cfg.SEED, 0)
    check_weights_exist(cfg.MODEL.WEIGHTS)
    if args.json:
        make_folder(args.json.parent)
    data = check_data(args, (), (), masks=cfg.MODEL.MASK_ON)
    set_data(cfg, data)
    register_folders(data.folders)

    model = build(cfg)
    pairs, resized = training_pairs(cfg, model.backbone.size_divisibility)
    gradients = accumulation_rows(model, pairs, resized)
    padding = padding_rows(model, pairs)
    padded = sum(map(is_padded, pairs))
    show(
        "Two batches of one picture against one of both: relative difference of the gradient, "
        f"median of {len(pairs)} pairs, {padded} of them padded",
        gradients,
    )
    show("A picture in a batch against the picture alone", padding)
    if args.json:
        tables = {"gradients": gradients, "padding": padding}
        write_atomically(args.json, json.dumps(tables, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="Config overrides, KEY VALUE ..., come last."
    )
    parser.add_argument("--config-file", required=True)
    parser.add_argument(
        "--train",
        nargs=2,
        required=True,
        metavar=("JSON", "IMAGES_DIR"),
        help="data set in COCO format, of at least 2 images",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    parser.set_defaults(val=None, skip_bad_images=False, eval_only=False)
    return parser.parse_args()


def build(cfg: CfgNode) -> nn.Module:
    """The model of a config, with MODEL.WEIGHTS or at a random start that follows from SEED."""
    seed_generators(cfg.SEED)
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def show(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n## {title}\n\n{tabulate(rows, headers='keys', tablefmt='github', floatfmt='.2g')}")


if __name__ == "__main__":
    run_command(main)
