"""Measure how far the gradient of accumulated batches is from that of one batch, and why.

Pairs of training images go through the model in one batch and in two batches of one image each,
while the causes of the difference are removed one after the other. A second table shows how far
padding changes the features and scores of an image.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gn_det.engine.command import RunOptions, add_data_arguments, add_overrides, run_command
from gn_det.engine.folders import new_folder
from gn_det.engine.run import check_run

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import nn

from gn_det.checkpoint import Checkpointer
from gn_det.config import load_config
from gn_det.data.seeding import seed_generators
from gn_det.files import write_atomically, write_json
from gn_det.studies.accumulation import (
    accumulation_rows,
    is_padded,
    padding_rows,
    training_pairs,
)


def main() -> None:
    args = parse_arguments()
    cfg = load_config(args.config_file, args.opts)
    cfg.SEED = max(cfg.SEED, 0)
    with new_folder(args.output):
        check_run(cfg, RunOptions.from_args(args), args.output).write_copies()
        model = build(cfg)
        pairs, resized = training_pairs(cfg, model.backbone.size_divisibility)
        padded = sum(map(is_padded, pairs))
        gradients = accumulation_rows(model, pairs, resized)
        padding = padding_rows(model, pairs)
    text = f"""## Two batches of one image against one of both

Relative difference of the gradient, median of {len(pairs)} pairs, {padded} of them padded.

{table(gradients)}

## An image in a batch against the image alone

{table(padding)}
"""
    print(f"\n{text}")
    write_atomically(args.output / "accumulation.md", text)
    write_json(args.output / "accumulation.json", {"gradients": gradients, "padding": padding})
    print(f"{args.output}: accumulation.md, accumulation.json")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables")
    add_data_arguments(parser, val=False, required=True)
    add_overrides(parser)
    return parser.parse_args()


def build(cfg: CfgNode) -> nn.Module:
    """The model of a config, with MODEL.WEIGHTS or at a random start that follows from SEED."""
    seed_generators(cfg.SEED)
    model = build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        Checkpointer(model).load(cfg.MODEL.WEIGHTS)
    return model


def table(rows: list[dict[str, Any]]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2g")


if __name__ == "__main__":
    run_command(main)
