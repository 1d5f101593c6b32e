"""Train and evaluate a detector from a LazyConfig (.py) file, which is code and runs as such.

The flags are Detectron2's; --train and --val train on any COCO-format folder.
"""

from __future__ import annotations

import argparse
import copy
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import gn_det.engine  # noqa: F401  (first: it silences third-party warnings)

# isort: split
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from gn_det.checkpoint import Checkpointer, check_weights_exist
from gn_det.config import load_lazy_config
from gn_det.data.datasets import register_folders
from gn_det.engine.arguments import argument_parser
from gn_det.engine.command import run_command
from gn_det.engine.launch import check_processes, launch
from gn_det.engine.run import run_folder, set_up_process, write_results, written_folder
from gn_det.engine.run_data import RunData, check_data
from gn_det.engine.step import AccumulatingTrainer, amp_dtype
from gn_det.engine.trainer import describe_model, wrap_ddp


def main() -> None:
    args = argument_parser(__doc__, "key=value ...").parse_args()
    cfg = load_lazy_config(args.config_file, args.opts)

    check_processes(
        cfg.train.device, args, cfg.dataloader.train.total_batch_size, amp=cfg.train.amp.enabled
    )
    with run_folder(cfg.train.output_dir, args) as output_dir:
        if not (args.resume and (output_dir / "last_checkpoint").exists()):
            check_weights_exist(cfg.train.init_checkpoint)
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
    cfg = load_lazy_config(args.config_file, args.opts)
    set_data(cfg, data)
    register_folders(data.folders)
    set_up_process(written_folder(cfg.train.output_dir, args), cfg.train.get("seed", -1))

    model = instantiate(cfg.model).to(cfg.train.device)
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
    loader = instantiate(cfg.dataloader.train)
    model = wrap_ddp(model, cfg.train.device, **cfg.train.ddp)
    trainer = AccumulatingTrainer(
        model,
        loader,
        optimizer,
        cfg.train.get("accumulate_steps", 1),
        amp_dtype(cfg.train.amp.enabled),
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
            hooks.EvalHook(cfg.train.eval_period, evaluate_and_keep),
            hooks.PeriodicWriter(
                default_writers(cfg.train.output_dir, cfg.train.max_iter), cfg.train.log_period
            )
            if main
            else None,
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    if main:
        LazyConfig.save(resolved, str(Path(cfg.train.output_dir) / "config.yaml"))
    resumed = resume and checkpointer.has_checkpoint()
    trainer.train(trainer.iter + 1 if resumed else 0, cfg.train.max_iter)
    return results


def _names(loader: DictConfig) -> list[str]:
    names = loader.dataset.names
    return [names] if isinstance(names, str) else list(names)


if __name__ == "__main__":
    run_command(main)
