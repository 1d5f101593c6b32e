"""Train a classifier with any norm, by the Group Normalization paper's ImageNet recipe.

It writes a backbone that MODEL.WEIGHTS loads, and beside it, as a config fragment, the settings
that a detector has to share with it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from gn_det.engine.command import RunOptions, run_command
from gn_det.engine.folders import run_folder
from gn_det.engine.launch import check_processes, follow, launch, torchrun_rank, with_torchrun
from gn_det.engine.process import set_up_process

from detectron2.utils import comm

from gn_det.classification.command import CPU, add_recipe_arguments, recipe_of
from gn_det.classification.training import ClassifierRecipe, train_classifier


def main() -> None:
    args = parse_arguments()
    options = with_torchrun(RunOptions.from_args(args))
    recipe = recipe_of(args)
    recipe.check(args.device)
    ims_per_step = recipe.ims_per_gpu * options.world_size
    check_processes(args.device, options, ims_per_step, amp=recipe.amp, cpu=CPU)
    print(json.dumps(asdict(recipe), indent=2))
    with run_folder(str(args.output), options) as folder:
        launch(
            run, args.device, options, recipe, folder, args.device, options.resume, args.num_workers
        )


def run(
    recipe: ClassifierRecipe, folder: Path, device: str, resume: bool, num_workers: int
) -> None:
    """Train and evaluate in this process."""
    set_up_process(folder, recipe.seed, cudnn_benchmark=True, resume=resume)
    results = train_classifier(recipe, folder, device, resume=resume, num_workers=num_workers)
    if comm.is_main_process():
        print(
            f"{recipe.network} with {recipe.norm}: validation error {results['val_error']:.1f}%, "
            f"training error {results['train_error']:.1f}%; {folder / 'backbone.pth'}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    add_recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run")
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="processes, one for each GPU (default: %(default)s)"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_command(follow if torchrun_rank() else main)
