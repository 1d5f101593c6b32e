"""Generate the shapes set: a small COCO-format data set that trains on two CPU cores."""

from __future__ import annotations

import argparse

from gn_det.engine.command import run_command

from gn_det.data.shapes import generate_shapes


def main() -> None:
    args = parse_arguments()
    generate_shapes(args.output, args.num_train, args.num_val, args.seed)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", required=True, help="folder to create: images/, train.json, val.json"
    )
    parser.add_argument("--num-train", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--num-val", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
