"""Detectron2's DefaultTrainer, for any device, with our evaluation and checkpoints."""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

import gn_det.modeling  # noqa: F401  (registers it in spawned processes, too)
from gn_det.checkpoint import Checkpointer
from gn_det.engine.evaluation import build_evaluator
from gn_det.engine.step import AccumulatingTrainer, amp_dtype
from gn_det.injection import audit

__all__ = ["Trainer", "describe_model", "wrap_ddp"]


class Trainer(DefaultTrainer):
    """DefaultTrainer whose processes may run on the CPU, too.

    The constructor is DefaultTrainer's but for DDP (which it gives device_ids, refused on the
    CPU), the step, the checkpointer, and a description of the model in place of its printout.

    Args:
        cfg: the whole config.
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
        super().train()
        return self._last_eval_results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_model(cfg)
        if cfg.MODEL.CHANNELS_LAST:
            model.to(memory_format=torch.channels_last)
        logging.getLogger(__name__).info(describe_model(model))
        return model

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        return build_evaluator(cfg, dataset_name)


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
