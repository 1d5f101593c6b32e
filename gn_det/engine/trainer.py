"""Detectron2's DefaultTrainer, for any device, with our evaluation and checkpoints."""

from __future__ import annotations

import logging
import weakref
from contextlib import closing
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn
from torch.utils.data import DataLoader

import gn_det.modeling  # noqa: F401  (registers it in spawned processes, too)
from gn_det.checkpoint import Checkpointer
from gn_det.data.proposals import check_config_proposals
from gn_det.data.train_loader import TrainLoader, build_train_loader
from gn_det.engine.evaluation import build_evaluator
from gn_det.engine.step import AccumulatingTrainer, amp_dtype
from gn_det.engine.termination import interruptible_evaluation
from gn_det.engine.writers import build_writers
from gn_det.errors import InputError
from gn_det.injection import audit, recompute
from gn_det.layers import WeightStandardized
from gn_det.layers.detectron2.roi_align import align_exactly
from gn_det.layers.recomputation import recomputes_in

__all__ = ["Trainer", "describe_model", "prepare_model", "wrap_ddp"]


class Trainer(DefaultTrainer):
    """DefaultTrainer whose processes may run on the CPU, too.

    The constructor is DefaultTrainer's but for DDP (which it gives device_ids, refused on the
    CPU), the batches, the step, the checkpointer, and a description of the model in place of its
    printout. A step depends on the weights, the optimizer and (SEED, rank, iteration) alone.

    Args:
        cfg: the whole config, with a SEED that is not negative.
    """

    def __init__(self, cfg: CfgNode) -> None:
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        data_loader = self.build_train_loader(cfg)
        model = wrap_ddp(model, cfg.MODEL.DEVICE, broadcast_buffers=False)
        self._trainer = AccumulatingTrainer(
            model,
            data_loader,
            optimizer,
            cfg.SOLVER.ACCUMULATE_STEPS,
            amp_dtype(cfg.SOLVER.AMP.ENABLED),
            cfg.SEED,
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def train(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            What the last evaluation returned; empty where DATASETS.TEST is, and on all processes
            but the main one.
        """
        self.data_loader.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE_STEPS
        with closing(self.data_loader):
            super().train()
        return self._last_eval_results

    def build_hooks(self) -> list[HookBase]:
        def evaluate() -> dict[str, Any]:
            self._last_eval_results = self.test(self.cfg, self.model)
            return self._last_eval_results

        built = super().build_hooks()
        # After the learning rate's step, which belongs to the checkpoint.
        before = next(i for i, hook in enumerate(built) if isinstance(hook, hooks.EvalHook))
        built[before : before + 1] = interruptible_evaluation(
            self.checkpointer, self.cfg.TEST.EVAL_PERIOD, evaluate
        )
        return built

    def build_writers(self) -> list[EventWriter]:
        return build_writers(self.cfg.OUTPUT_DIR, self.max_iter)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> TrainLoader:
        return build_train_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        check_config_proposals(cfg, "TEST", cfg.DATASETS.TEST)
        return super().build_test_loader(cfg, dataset_name)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        for key, acts_on in (
            ("WEIGHT_STANDARDIZATION", lambda module: isinstance(module, WeightStandardized)),
            ("RECOMPUTE", recomputes_in),
        ):
            if cfg.MODEL.GN[key] and not any(map(acts_on, model.modules())):
                raise InputError(
                    f"MODEL.GN.{key} changes nothing: none of gn_det's components is in this "
                    f"config; MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, "
                    "GNGeneralizedRCNN would be one"
                )
        if cfg.MODEL.GN.RECOMPUTE:
            recompute(model)  # as a whole: what parts hand to each other, too
        prepare_model(
            model,
            channels_last=cfg.MODEL.CHANNELS_LAST,
            compile_backbone=cfg.MODEL.BACKBONE.COMPILE,
        )
        logging.getLogger(__name__).info(describe_model(model))
        return model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


def prepare_model(model: nn.Module, *, channels_last: bool, compile_backbone: bool) -> None:
    """Give a built model its memory format and exact boxes, and compile its backbone, in place.

    Names of modules and weights stay.

    Args:
        model: a detector.
        channels_last: whether convolutions and their features are in that order.
        compile_backbone: whether ``model.backbone`` runs through torch.compile.

    Raises:
        InputError: a backbone is to be compiled, and the model has none, or recomputes.
    """
    align_exactly(model)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compile_backbone:
        if not hasattr(model, "backbone"):
            raise InputError(f"{type(model).__name__} has no backbone to compile")
        if any(map(recomputes_in, model.modules())):
            raise InputError(
                "MODEL.GN.RECOMPUTE and MODEL.BACKBONE.COMPILE are both set, and torch.compile "
                "decides by itself what to compute again: leave one of them out"
            )
        model.backbone.compile()


def wrap_ddp(model: nn.Module, device: str, **kwargs: Any) -> nn.Module:
    """Detectron2's create_ddp_model for any device; the model itself where there is one process."""
    if torch.device(device).type == "cpu":
        kwargs["device_ids"] = None
    return create_ddp_model(model, **kwargs)


def describe_model(model: nn.Module) -> str:
    """Class, parameters in millions and how many train, and the audit of its norms."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    total = sum(size for size, _ in sizes) / 1e6
    trained = sum(size for size, trains in sizes if trains) / 1e6
    return (
        f"{type(model).__name__}: {total:.1f}M parameters, {trained:.1f}M of them trained\n"
        f"{audit(model)}"
    )
