"""Error against images per step for several norms (Wu & He 2018, figure 1 and table 2).

Every norm trains at every number of images with every seed, for the same epochs, at a learning rate
in proportion. What is interrupted goes on when this is run again.
"""

from __future__ import annotations

import argparse

from gn_det.engine.command import run_command

from gn_det.classification.command import add_recipe_arguments, recipe_of
from gn_det.classification.networks import NORMS
from gn_det.files import write_atomically
from gn_det.studies.paper.report import (
    describe_degradation,
    error_table,
    plot_error_by_batch,
    plot_error_curves,
    results_csv,
)
from gn_det.studies.paper.sweep import add_sweep_arguments, run_sweep


def main() -> int:
    args = parse_arguments()
    # Where GN is not among the norms, its groups are an error of theirs.
    no_groups = {"num_groups": None, "channels_per_group": None} if "GN" in args.norms else {}
    recipes = {
        f"{norm}-{ims_per_gpu}ims-seed{seed}": recipe_of(
            args,
            norm=norm,
            ims_per_gpu=ims_per_gpu,
            seed=seed,
            **({} if norm == "GN" else no_groups),
        )
        for seed in args.seeds
        for ims_per_gpu in args.ims_per_gpu
        for norm in args.norms
    }
    trained = run_sweep(
        recipes, args.output, device=args.device, jobs=args.jobs, num_workers=args.num_workers
    )
    write_atomically(args.output / "errors.csv", results_csv(trained))
    plot_error_by_batch(trained, args.output / "error_by_batch.png")
    plot_error_curves(trained, args.output / "error_curves.png")
    for metric, title in (("val_error", "Validation"), ("train_error", "Training")):
        table = error_table(
            trained, lambda t: t.norm, lambda t: t.ims_per_gpu, "images per step", metric
        )
        print(f"\n{title} error in percent:\n\n{table}")
    print(f"\nValidation error:\n{describe_degradation(trained)}\n")
    print(f"{args.output}: errors.csv, error_by_batch.png, error_curves.png")
    return 1 if any(t.failure for t in trained) else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["BN", "LN", "IN", "GN"])
    parser.add_argument("--ims-per-gpu", nargs="+", type=int, default=[32, 16, 8, 4, 2])
    add_sweep_arguments(parser)
    add_recipe_arguments(parser, varied=["norm", "ims_per_gpu", "seed"])
    return parser.parse_args()


if __name__ == "__main__":
    run_command(main)
