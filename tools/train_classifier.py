"""Train a classifier with any norm, by the Group Normalization paper's ImageNet recipe.

It writes a backbone that MODEL.WEIGHTS loads, and beside it, as a config fragment, the settings
that a detector has to share with it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from detectron2.utils import comm

from gn_det.classification.command import add_recipe_arguments, recipe_of
from gn_det.classification.training import ClassifierRecipe, train_classifier
from gn_det.engine.command import run_command
from gn_det.engine.launch import check_processes, follow, launch, torchrun_rank, use_torchrun
from gn_det.engine.run import run_folder, set_up_process


def main() -> None:
    args = parse_arguments()
    use_torchrun(args)
    recipe = recipe_of(args)
    check_processes(
        args.device, args, recipe.ims_per_gpu * args.num_gpus * args.num_machines, amp=recipe.amp
    )
    print(json.dumps(asdict(recipe), indent=2))
    with run_folder(str(args.output_dir), args):
        launch(run, args.device, args, recipe, args)


def run(recipe: ClassifierRecipe, args: argparse.Namespace) -> None:
    """Train and evaluate in this process."""
    set_up_process(args.output_dir, recipe.seed, cudnn_benchmark=True, resume=args.resume)
    results = train_classifier(
        recipe,
        args.output_dir,
        args.device,
        resume=args.resume,
        num_workers=args.num_workers,
    )
    if comm.is_main_process():
        print(
            f"{recipe.network} with {recipe.norm}: validation error {results['val_error']:.1f}%, "
            f"training error {results['train_error']:.1f}%; {args.output_dir / 'backbone.pth'}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path, help="folder of the run")
    add_recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes")
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto", eval_only=False)
    return parser.parse_args()


if __name__ == "__main__":
    run_command(follow if torchrun_rank() else main)
