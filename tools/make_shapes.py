"""Generate the shapes set: a small COCO-format data set that trains on two CPU cores."""

from __future__ import annotations

import argparse

from gn_det.data.shapes import generate_shapes
from gn_det.engine.command import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="folder to create: images/, train.json, val.json")
    parser.add_argument("--num-train", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--num-val", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    generate_shapes(args.output, args.num_train, args.num_val, args.seed)


if __name__ == "__main__":
    run_command(main)
