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

from gn_det.engine.building import building
from gn_det.engine.command import RunOptions, run_command, training_parser
from gn_det.engine.folders import run_folder, write_results, written_folder
from gn_det.engine.hand_over import HandOverHook
from gn_det.engine.launch import follow, launch, torchrun_rank, with_torchrun
from gn_det.engine.loop import fit
from gn_det.engine.process import set_up_process
from gn_det.engine.resume import begin_or_resume
from gn_det.engine.run import check_run
from gn_det.engine.run_data import RunData, set_data
from gn_det.engine.schedule import resolve_lazy_schedule, schedule_table
from gn_det.engine.step import AccumulatingTrainer
from gn_det.engine.trainer import describe_model, prepare_model, wrap_ddp
from gn_det.engine.writers import build_writers

from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetMapper, build_detection_train_loader
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from gn_det.amp import amp_dtype
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.checkpointer import last_checkpoint
from gn_det.config import load_lazy_config
from gn_det.data.datasets import register_folders
from gn_det.data.mapper import PictureMapper
from gn_det.data.train_loader import build_train_loader, set_up_worker
from gn_det.modeling.timm_backbone import TimmBackbone, check_timm_input, freeze_unread_maps


def main() -> None:
    args = parse_arguments()
    options = with_torchrun(RunOptions.from_args(args))
    reference = load_lazy_config(args.config_file, args.opts)
    cfg = resolve_lazy_schedule(reference, options.world_size)
    if cfg is not reference and not options.eval_only:
        print(f"\n{schedule_table(reference, cfg, options.world_size)}\n")
    with run_folder(cfg.train.output_dir, options) as folder:
        data = check_run(cfg, options, folder)
        begin_or_resume(cfg, folder, data, options)
        data.write_copies(write=options.machine_rank == 0)
        launch(run, cfg.train.device, options, args.config_file, args.opts, options, data)


def parse_arguments() -> argparse.Namespace:
    return training_parser(__doc__, "key=value ...").parse_args()


def run(config_file: str, overrides: list[str], options: RunOptions, data: RunData) -> None:
    """Train and evaluate, or evaluate, in this process."""
    # Read again, since what a LazyConfig may hold cannot always be sent to a process.
    cfg = load_lazy_config(config_file, overrides)
    cfg = resolve_lazy_schedule(cfg, comm.get_world_size())
    set_data(cfg, data)
    register_folders(data.folders)
    folder = written_folder(cfg.train.output_dir, options)
    cfg.train.seed = set_up_process(folder, cfg.train.get("seed", -1), resume=options.resume)

    as_written = copy.deepcopy(cfg)
    _ours(cfg, options.skip_bad_images)
    goes_on = options.resume and last_checkpoint(folder) is not None
    if goes_on or (options.eval_only and cfg.train.init_checkpoint):
        _leave_out_timm_weights(cfg.model)
    with building("the model"):
        model = instantiate(cfg.model).to(cfg.train.device)
        freeze_unread_maps(model)
        check_timm_input(model, starts_from_weights=bool(cfg.train.init_checkpoint))
    prepare_model(
        model,
        channels_last=cfg.train.get("channels_last", False),
        compile_backbone=cfg.train.get("compile_backbone", False),
    )
    logging.getLogger("gn_det").info(describe_model(model))
    if options.eval_only:
        checkpointer = Checkpointer(model, cfg.train.output_dir)
        checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=options.resume)
        cfg.train.output_dir = str(folder)
        evaluate(cfg, model)
        return
    results = train(cfg, as_written, model, resume=options.resume)
    if comm.is_main_process() and results:
        write_results(cfg.train.output_dir, results)


def evaluate(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Evaluate on dataloader.test; nothing where it names no data set."""
    if not cfg.dataloader.test.dataset.names:
        return {}
    with building("the evaluation"):
        loader = instantiate(cfg.dataloader.test)
        evaluator = instantiate(cfg.dataloader.evaluator)
    if isinstance(loader, DataLoader):
        loader.worker_init_fn = set_up_worker
    results = inference_on_dataset(model, loader, evaluator)
    print_csv_format(results or OrderedDict())
    return results


def train(
    cfg: DictConfig, as_written: DictConfig, model: nn.Module, resume: bool
) -> dict[str, Any]:
    """Train to the end, keep the config as it was written; the results of the last evaluation."""
    cfg.optimizer.params.model = model
    with building("the optimizer"):
        optimizer = instantiate(cfg.optimizer)
        scheduler = instantiate(cfg.lr_multiplier)
    with building("the loader of the training set"):
        loader = instantiate(cfg.dataloader.train)
    model = wrap_ddp(model, cfg.train.device, **cfg.train.ddp)
    trainer = AccumulatingTrainer(
        model,
        loader,
        optimizer,
        cfg.train.get("accumulate_steps", 1),
        amp_dtype(cfg.train.amp.enabled),
        cfg.train.seed,
    )
    main = comm.is_main_process()
    steps = cfg.train.get("hand_over_steps", 0)

    def write_config() -> None:
        if main:
            LazyConfig.save(as_written, str(Path(cfg.train.output_dir) / "config.yaml"))

    return fit(
        trainer,
        Checkpointer(model, cfg.train.output_dir, trainer=trainer),
        scheduler,
        cfg.train.max_iter,
        weights=cfg.train.init_checkpoint,
        resume=resume,
        checkpoint_period=cfg.train.checkpointer.period,
        max_to_keep=cfg.train.checkpointer.get("max_to_keep"),
        evaluate=lambda: evaluate(cfg, model),
        eval_period=cfg.train.eval_period,
        writers=build_writers(cfg.train.output_dir, cfg.train.max_iter) if main else (),
        log_period=cfg.train.log_period,
        more_hooks=[HandOverHook(model, steps)] if steps else (),
        on_start=write_config,
    )


def _ours(cfg: DictConfig, skip_bad_images: bool) -> None:
    """Detectron2's loaders as ours: a run can begin anywhere, and all pictures are read alike."""
    train, test = cfg.dataloader.train, cfg.dataloader.test
    if _is(train, build_detection_train_loader):
        train._target_, train.seed = build_train_loader, cfg.train.seed
        train.skip_bad_images = skip_bad_images
    for loader in (train, test):
        if "mapper" in loader and _is(loader.mapper, DatasetMapper):
            loader.mapper._target_ = PictureMapper
            loader.mapper.setdefault("value_range", train.mapper.get("value_range", []))


def _leave_out_timm_weights(node: Any) -> None:
    """Of a model whose checkpoint is going to be loaded, so that their file need not be there."""
    if isinstance(node, DictConfig):
        if "_target_" in node and _is(node, TimmBackbone):
            node.weights = ""
        for key in node:
            if not OmegaConf.is_missing(node, key):
                _leave_out_timm_weights(node[key])
    elif isinstance(node, ListConfig):
        for each in node:
            _leave_out_timm_weights(each)


def _is(node: DictConfig, target: object) -> bool:
    named = node._target_
    return (locate(named) if isinstance(named, str) else named) is target


if __name__ == "__main__":
    run_command(follow if torchrun_rank() else main)
