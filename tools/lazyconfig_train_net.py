"""Train and evaluate a detector from a LazyConfig (.py) file, which is code and runs as such.

The flags are Detectron2's; --train and --val train on any COCO-format folder.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections import OrderedDict
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from detectron2.config import LazyConfig, instantiate
from detectron2.data import build_detection_train_loader
from detectron2.engine import hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from gn_det.checkpoint import Checkpointer, check_weights_exist
from gn_det.config import load_lazy_config
from gn_det.data.datasets import register_folders
from gn_det.data.proposals import check_proposals
from gn_det.data.train_loader import TrainLoader, build_train_loader
from gn_det.engine.command import argument_parser, run_command
from gn_det.engine.launch import (
    check_processes,
    follow,
    launch,
    torchrun_rank,
    use_torchrun,
)
from gn_det.engine.run import run_folder, set_up_process, write_results, written_folder
from gn_det.engine.run_data import RunData, check_data, check_start
from gn_det.engine.schedule import resolve_lazy_schedule, schedule_table
from gn_det.engine.step import AccumulatingTrainer, amp_dtype
from gn_det.engine.termination import interruptible_evaluation
from gn_det.engine.trainer import describe_model, prepare_model, wrap_ddp
from gn_det.engine.writers import build_writers


def main() -> None:
    args = argument_parser(__doc__, "key=value ...").parse_args()
    use_torchrun(args)
    reference = load_lazy_config(args.config_file, args.opts)
    world_size = args.num_gpus * args.num_machines
    cfg = resolve_lazy_schedule(reference, world_size)
    if cfg is not reference and not args.eval_only:
        print(f"\n{schedule_table(reference, cfg, world_size)}\n")

    check_processes(
        cfg.train.device, args, cfg.dataloader.train.total_batch_size, amp=cfg.train.amp.enabled
    )
    with run_folder(cfg.train.output_dir, args) as output_dir:
        if not (args.resume and (output_dir / "last_checkpoint").exists()):
            check_weights_exist(cfg.train.init_checkpoint)
            if not args.eval_only:
                check_start(cfg.train.init_checkpoint, _freeze_at(cfg.model))
        data = check_data(
            args,
            _names(cfg.dataloader.train),
            _names(cfg.dataloader.test),
            masks=cfg.dataloader.train.mapper.get("use_instance_mask", False),
        )
        data.leave_out_bad_images(written_folder(output_dir, args))
        launch(run, cfg.train.device, args, args, data)


def set_data(cfg: DictConfig, data: RunData) -> None:
    """Set the data sets of a run, and what follows from COCO-format folders."""
    for loader, names in ((cfg.dataloader.train, data.train), (cfg.dataloader.test, data.test)):
        loader.dataset.names = names[0] if len(names) == 1 else names
    if data.categories:
        for part in (cfg.model, cfg.model.get("roi_heads", {})):
            if "num_classes" in part:
                part.num_classes = len(data.categories)
    if data.has_rle_masks:
        cfg.dataloader.train.mapper.instance_mask_format = "bitmask"


def run(args: argparse.Namespace, data: RunData) -> None:
    """Train and evaluate, or evaluate, in this process."""
    # Read again, since what a LazyConfig may hold cannot always be sent to a process.
    cfg = load_lazy_config(args.config_file, args.opts)
    cfg = resolve_lazy_schedule(cfg, comm.get_world_size())
    set_data(cfg, data)
    register_folders(data.folders)
    for split in ("test",) if args.eval_only else ("train", "test"):
        check_proposals(cfg.dataloader[split].dataset.get("proposal_files") or [])
    cfg.train.seed = set_up_process(
        written_folder(cfg.train.output_dir, args), cfg.train.get("seed", -1), resume=args.resume
    )

    model = instantiate(cfg.model).to(cfg.train.device)
    prepare_model(
        model,
        channels_last=cfg.train.get("channels_last", False),
        compile_backbone=cfg.train.get("compile_backbone", False),
    )
    logging.getLogger("gn_det").info(describe_model(model))
    if args.eval_only:
        checkpointer = Checkpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
        cfg.train.output_dir = str(written_folder(cfg.train.output_dir, args))
        evaluate(cfg, model)
        return
    results = train(cfg, model, resume=args.resume)
    if comm.is_main_process() and results:
        write_results(cfg.train.output_dir, results)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Evaluate on dataloader.test; nothing where it names no data set."""
    if not cfg.dataloader.test.dataset.names:
        return {}
    loader, evaluator = instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results or OrderedDict())
    return results


def train(cfg: DictConfig, model: nn.Module, resume: bool) -> dict[str, Any]:
    """Train to the end; the results of the last evaluation."""
    resolved = copy.deepcopy(cfg)
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    loader = instantiate(_any_start(cfg.dataloader.train, cfg.train.seed))
    model = wrap_ddp(model, cfg.train.device, **cfg.train.ddp)
    accumulate_steps = cfg.train.get("accumulate_steps", 1)
    trainer = AccumulatingTrainer(
        model,
        loader,
        optimizer,
        accumulate_steps,
        amp_dtype(cfg.train.amp.enabled),
        cfg.train.seed,
    )
    checkpointer = Checkpointer(model, cfg.train.output_dir, trainer=trainer)
    results: dict[str, Any] = {}

    def evaluate_and_keep() -> dict[str, Any]:
        results.clear()
        results.update(evaluate(cfg, model) or {})
        return results

    main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer) if main else None,
            *interruptible_evaluation(checkpointer, cfg.train.eval_period, evaluate_and_keep),
            hooks.PeriodicWriter(
                build_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period
            )
            if main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if main:
        LazyConfig.save(resolved, str(Path(cfg.train.output_dir) / "config.yaml"))
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    ours = isinstance(loader, TrainLoader)
    if ours:
        loader.start = start_iter * accumulate_steps
    elif start_iter > 0:
        logging.getLogger("gn_det").warning(
            f"{type(loader).__name__} begins anew: this run is not what it had been uninterrupted"
        )
    with closing(loader) if ours else nullcontext():
        trainer.train(start_iter, cfg.train.max_iter)
    return results


def _any_start(loader: DictConfig, seed: int) -> DictConfig:
    """Detectron2's training loader as ours, which a resumed run can begin anywhere."""
    target = loader._target_
    if (locate(target) if isinstance(target, str) else target) is build_detection_train_loader:
        loader = copy.deepcopy(loader)
        loader._target_, loader.seed = build_train_loader, seed
    return loader


def _freeze_at(model: DictConfig) -> int:
    """Frozen stages of a backbone, or of the one below its FPN."""
    keys = ("backbone.freeze_at", "backbone.bottom_up.freeze_at")
    return max(OmegaConf.select(model, key, default=0) for key in keys)


def _names(loader: DictConfig) -> list[str]:
    names = loader.dataset.names
    return [names] if isinstance(names, str) else list(names)


if __name__ == "__main__":
    run_command(follow if torchrun_rank() else main)
