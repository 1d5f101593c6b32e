"""Train and evaluate a detector from a YAML config.

The flags are Detectron2's; --train and --val train on any COCO-format folder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from detectron2.config import CfgNode
from detectron2.utils import comm

from gn_det.checkpoint import Checkpointer, check_weights_exist
from gn_det.config import dump_config, load_config
from gn_det.data.datasets import CocoFolder, register_folders
from gn_det.engine.command import argument_parser, run_command
from gn_det.engine.launch import (
    check_processes,
    follow,
    launch,
    torchrun_rank,
    use_torchrun,
)
from gn_det.engine.run import run_folder, set_up_process, write_results, written_folder
from gn_det.engine.run_data import check_config_data, check_start, set_data
from gn_det.engine.schedule import resolve_schedule, schedule_table
from gn_det.engine.trainer import Trainer
from gn_det.utils import write_atomically


def main() -> None:
    args = argument_parser(__doc__, "KEY VALUE ...").parse_args()
    use_torchrun(args)
    reference = load_config(args.config_file or None, args.opts)
    world_size = args.num_gpus * args.num_machines
    cfg = resolve_schedule(reference, world_size)
    if cfg is not reference and not args.eval_only:
        print(f"\n{schedule_table(reference, cfg, world_size)}\n")

    check_processes(cfg.MODEL.DEVICE, args, cfg.SOLVER.IMS_PER_BATCH, amp=cfg.SOLVER.AMP.ENABLED)
    with run_folder(cfg.OUTPUT_DIR, args) as output_dir:
        if not (args.resume and (output_dir / "last_checkpoint").exists()):
            check_weights_exist(cfg.MODEL.WEIGHTS)
            if not args.eval_only:
                check_start(cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT)
        data = check_config_data(args, cfg)
        data.leave_out_bad_images(written_folder(output_dir, args))
        set_data(cfg, data)
        cfg.freeze()
        launch(run, cfg.MODEL.DEVICE, args, cfg, args)


def run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Train and evaluate, or evaluate, in this process."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = set_up_process(
        written_folder(cfg.OUTPUT_DIR, args), cfg.SEED, cfg.CUDNN_BENCHMARK, resume=args.resume
    )
    cfg.freeze()
    register_folders([CocoFolder(*folder) for folder in cfg.DATASETS.COCO_FOLDERS])
    if args.eval_only:
        evaluate(cfg, args)
        return
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if comm.is_main_process():
        write_atomically(Path(cfg.OUTPUT_DIR) / "config.yaml", dump_config(cfg))
    results = trainer.train()
    if comm.is_main_process() and results:
        write_results(cfg.OUTPUT_DIR, results)


def evaluate(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Evaluate MODEL.WEIGHTS, or with --resume the last checkpoint of the run."""
    model = Trainer.build_model(cfg)
    Checkpointer(model, cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(written_folder(cfg.OUTPUT_DIR, args))
    Trainer.test(cfg, model)


if __name__ == "__main__":
    run_command(follow if torchrun_rank() else main)
