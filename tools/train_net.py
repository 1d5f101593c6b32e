"""Train and evaluate a detector from a YAML config.

The flags are Detectron2's; --train and --val train on any COCO-format folder.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from gn_det.engine.command import RunOptions, run_command, training_parser
from gn_det.engine.evaluation import check_expected
from gn_det.engine.folders import run_folder, write_results, written_folder
from gn_det.engine.launch import follow, launch, torchrun_rank, with_torchrun
from gn_det.engine.process import set_up_process
from gn_det.engine.resume import begin_or_resume
from gn_det.engine.run import check_run
from gn_det.engine.schedule import resolve_schedule, schedule_table
from gn_det.engine.trainer import (
    build_model,
    evaluate,
    evaluate_augmented,
    train,
    with_augmentation,
)

from detectron2.config import CfgNode
from detectron2.utils import comm

from gn_det.checkpoint import Checkpointer
from gn_det.config import dump_config, load_config
from gn_det.data.datasets import CocoFolder, register_folders
from gn_det.files import write_atomically


def main() -> None:
    args = parse_arguments()
    options = with_torchrun(RunOptions.from_args(args))
    reference = load_config(args.config_file or None, args.opts)
    cfg = resolve_schedule(reference, options.world_size)
    if cfg is not reference and not options.eval_only:
        print(f"\n{schedule_table(reference, cfg, options.world_size)}\n")
    with run_folder(cfg.OUTPUT_DIR, options) as folder:
        data = check_run(cfg, options, folder)
        begin_or_resume(cfg, folder, data, options)
        data.write_copies(write=options.machine_rank == 0)
        cfg.freeze()
        launch(run, cfg.MODEL.DEVICE, options, cfg, options)


def parse_arguments() -> argparse.Namespace:
    return training_parser(__doc__, "KEY VALUE ...").parse_args()


def run(cfg: CfgNode, options: RunOptions) -> None:
    """Train and evaluate, or evaluate, in this process."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = set_up_process(
        written_folder(cfg.OUTPUT_DIR, options),
        cfg.SEED,
        cfg.CUDNN_BENCHMARK,
        resume=options.resume,
    )
    cfg.freeze()
    register_folders([CocoFolder(*folder) for folder in cfg.DATASETS.COCO_FOLDERS])
    if options.eval_only:
        evaluate_weights(cfg, options)
        return

    def write_config() -> None:
        if comm.is_main_process():
            write_atomically(Path(cfg.OUTPUT_DIR) / "config.yaml", dump_config(cfg))

    keep = partial(write_results, cfg.OUTPUT_DIR)
    _, results = train(cfg, resume=options.resume, on_start=write_config, on_results=keep)
    if comm.is_main_process() and results:
        keep(results)
        check_expected(cfg, results)


def evaluate_weights(cfg: CfgNode, options: RunOptions) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint of the run."""
    model = build_model(cfg, weights_follow=True)
    Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=options.resume)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(written_folder(cfg.OUTPUT_DIR, options))
    augmented = with_augmentation(cfg, model)
    evaluate(cfg, model)
    evaluate_augmented(cfg, augmented)


if __name__ == "__main__":
    run_command(follow if torchrun_rank() else main)
