"""Error by the number of groups of GN, and by the channels in each (Wu & He 2018, table 3).

One group is layer norm, one channel per group is instance norm; that is checked first. What is
interrupted goes on when this is run again.
"""

from __future__ import annotations

import argparse

from gn_det.engine.command import run_command

import torch
import torch.nn.functional as F

from gn_det import FusedGroupNorm
from gn_det.classification.command import add_recipe_arguments, recipe_of
from gn_det.files import write_atomically
from gn_det.studies.paper.report import (
    ClassifierResult,
    error_table,
    plot_group_errors,
    results_csv,
)
from gn_det.studies.paper.sweep import add_sweep_arguments, run_sweep

_KINDS = {"num_groups": "groups", "channels_per_group": "channels per group"}


def main() -> int:
    args = parse_arguments()
    for norm, difference in differences_at_the_ends().items():
        print(f"GN is {norm}: the largest difference is {difference:.1e}")
        if difference > 1e-5:
            raise RuntimeError(f"GN is not {norm}")
    recipes = {
        f"{kind}-{number}-seed{seed}": recipe_of(
            args, norm="GN", seed=seed, **{**dict.fromkeys(_KINDS), kind: number}
        )
        for seed in args.seeds
        for kind in _KINDS
        for number in getattr(args, kind)
    }
    trained = run_sweep(
        recipes, args.output, device=args.device, jobs=args.jobs, num_workers=args.num_workers
    )
    write_atomically(args.output / "errors.csv", results_csv(trained))
    plot_group_errors(trained, args.output / "group_errors.png")
    print("\nValidation error in percent:")
    for kind, title in _KINDS.items():
        of_kind = [t for t in trained if getattr(t, kind) is not None]

        def number(t: ClassifierResult, kind: str = kind) -> int:
            return getattr(t, kind)

        print(f"\n{error_table(of_kind, lambda t: 'GN', number, title)}")
    print(f"\n{args.output}: errors.csv, group_errors.png")
    return 1 if any(t.failure for t in trained) else 0


def differences_at_the_ends(channels: int = 64) -> dict[str, float]:
    """The largest difference of GN's ends from PyTorch's layer norm and instance norm."""
    x = torch.randn(4, channels, 7, 5, generator=torch.Generator().manual_seed(0))
    others = {
        "LN at 1 group": (1, F.layer_norm(x, x.shape[1:])),
        "IN at 1 channel per group": (channels, F.instance_norm(x)),
    }
    return {
        name: (FusedGroupNorm(channels, groups)(x) - expected).abs().max().item()
        for name, (groups, expected) in others.items()
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    numbers = [64, 32, 16, 8, 4, 2, 1]
    for kind, title in _KINDS.items():
        parser.add_argument(
            f"--{kind.replace('_', '-')}",
            nargs="+",
            type=int,
            default=numbers,
            help=f"{title}; a layer takes the largest divisor of its channels below each",
        )
    add_sweep_arguments(parser)
    add_recipe_arguments(parser, varied=["norm", "num_groups", "channels_per_group", "seed"])
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
