"""Building, training and evaluating the detector of a YAML config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detectron2.modeling
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

import gn_det.modeling  # noqa: F401  (registers it in spawned processes, too)
from gn_det.amp import amp_dtype
from gn_det.checkpoint import Checkpointer
from gn_det.checkpoint.checkpointer import last_checkpoint
from gn_det.data.mapper import PictureMapper
from gn_det.data.proposals import check_config_proposals
from gn_det.data.train_loader import build_train_loader, set_up_worker
from gn_det.engine.building import building
from gn_det.engine.evaluation import build_evaluator
from gn_det.engine.hand_over import HandOverHook
from gn_det.engine.loop import fit
from gn_det.engine.optimizer import build_optimizer
from gn_det.engine.step import AccumulatingTrainer
from gn_det.engine.writers import build_writers
from gn_det.errors import InputError
from gn_det.files import writing
from gn_det.injection import audit, recompute
from gn_det.layers import WeightStandardized
from gn_det.layers.detectron2.roi_align import align_exactly
from gn_det.layers.hand_over import HandOver, hand_overs
from gn_det.layers.recomputation import recomputes_in

__all__ = [
    "build_model",
    "describe_model",
    "evaluate",
    "evaluate_augmented",
    "prepare_model",
    "train",
    "with_augmentation",
    "wrap_ddp",
]


def train(
    cfg: CfgNode,
    *,
    resume: bool = False,
    more_hooks: Sequence[HookBase] = (),
    on_start: Callable[[], None] | None = None,
    on_results: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train the detector of a config in this process, one of several perhaps.

    What Detectron2's DefaultTrainer does, on any device. A step depends on the weights, the
    optimizer and (SEED, rank, iteration) alone.

    Args:
        cfg: the whole config, with a SEED that is not negative.
        resume: whether to continue from the last checkpoint in OUTPUT_DIR, if there is one.
        more_hooks, on_start: see :func:`gn_det.engine.loop.fit`.
        on_results: called in the main process with what the last evaluation returned, before that
            with TEST.AUG begins.

    Returns:
        The model, and what the last evaluation returned: empty where DATASETS.TEST is, and on all
        processes but the main one.
    """
    cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
    goes_on = resume and last_checkpoint(Path(cfg.OUTPUT_DIR)) is not None
    model = build_model(cfg, weights_follow=goes_on)
    augmented = with_augmentation(cfg, model)
    with building("the optimizer"):
        optimizer = build_optimizer(cfg, model)
        scheduler = build_lr_scheduler(cfg, optimizer)
    with building("the loader of the training set"):
        loader = build_train_loader(cfg)
    wrapped = wrap_ddp(model, cfg.MODEL.DEVICE, broadcast_buffers=False)
    trainer = AccumulatingTrainer(
        wrapped,
        loader,
        optimizer,
        cfg.SOLVER.ACCUMULATE_STEPS,
        amp_dtype(cfg.SOLVER.AMP.ENABLED),
        cfg.SEED,
    )
    main = comm.is_main_process()
    results = fit(
        trainer,
        Checkpointer(wrapped, cfg.OUTPUT_DIR, trainer=trainer),
        scheduler,
        cfg.SOLVER.MAX_ITER,
        weights=cfg.MODEL.WEIGHTS,
        resume=resume,
        checkpoint_period=cfg.SOLVER.CHECKPOINT_PERIOD,
        evaluate=lambda: evaluate(cfg, wrapped),
        eval_period=cfg.TEST.EVAL_PERIOD,
        writers=build_writers(cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER) if main else (),
        more_hooks=[*_hand_over(cfg, model), *_precise_bn(cfg, model), *more_hooks],
        on_start=on_start,
    )
    if main and results and on_results is not None:
        on_results(results)
    of_augmented = evaluate_augmented(cfg, augmented)
    if main:
        results |= of_augmented
    return model, results


def evaluate(cfg: CfgNode, model: nn.Module, folder: str = "inference") -> dict[str, Any]:
    """Evaluate a model on DATASETS.TEST, as Detectron2's DefaultTrainer does.

    Args:
        cfg: of the model.
        model: it.
        folder: name of that for predictions, in OUTPUT_DIR.

    Returns:
        Metrics by task; where there are several sets, those by the name of the set.

    Raises:
        InputError: a set that cannot be evaluated, or its proposals are missing or unsafe to read.
    """
    check_config_proposals(cfg, "TEST", cfg.DATASETS.TEST)
    evaluators = [build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
    with writing(cfg.OUTPUT_DIR):
        return _Evaluation.test(cfg, model, evaluators)


def with_augmentation(cfg: CfgNode, model: nn.Module) -> nn.Module | None:
    """The model with TEST.AUG, Detectron2's augmentation in testing; None where it is not enabled.

    Raises:
        InputError: Detectron2 has none for the model, such as one with keypoints.
    """
    if not cfg.TEST.AUG.ENABLED or not cfg.DATASETS.TEST:
        return None
    with building("the augmentation in testing"):
        return GeneralizedRCNNWithTTA(cfg, model)


def evaluate_augmented(cfg: CfgNode, augmented: nn.Module | None) -> dict[str, Any]:
    """Evaluate :func:`with_augmentation` on DATASETS.TEST.

    Returns:
        What :func:`evaluate` does, with ``_TTA`` behind each name, as Detectron2's train_net.py has
        it; empty without augmentation.
    """
    if augmented is None:
        return {}
    logging.getLogger(__name__).info("with TEST.AUG, the augmentation in testing:")
    results = evaluate(cfg, augmented, "inference_TTA")
    return {f"{name}_TTA": metrics for name, metrics in results.items()}


class _Evaluation(DefaultTrainer):
    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        mapper = PictureMapper(cfg, is_train=False)
        loader = build_detection_test_loader(cfg, dataset_name, mapper=mapper)
        loader.worker_init_fn = set_up_worker
        return loader


def build_model(cfg: CfgNode, *, weights_follow: bool = False) -> nn.Module:
    """The model of a config as it trains, and a description of it in the log.

    Args:
        cfg: the whole config.
        weights_follow: whether a checkpoint of the whole model is going to be loaded, so that
            MODEL.TIMM.WEIGHTS need not be there any more.

    Raises:
        InputError: values that the parts of the model refuse, a key of MODEL.GN that changes
            nothing, or see :func:`prepare_model`.
    """
    if weights_follow:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.TIMM.WEIGHTS = ""
    with building("the model", cfg):
        model = detectron2.modeling.build_model(cfg)
    for key, acts_on in (
        ("WEIGHT_STANDARDIZATION", lambda module: isinstance(module, WeightStandardized)),
        ("RECOMPUTE", recomputes_in),
        ("HAND_OVER_STEPS", lambda module: isinstance(module, HandOver)),
    ):
        if cfg.MODEL.GN[key] and not any(map(acts_on, model.modules())):
            raise InputError(
                f"MODEL.GN.{key} changes nothing: none of gn_det's components is in this "
                "config, or none has what it acts on; MODEL.META_ARCHITECTURE is "
                f"{cfg.MODEL.META_ARCHITECTURE}, GNGeneralizedRCNN would be one"
            )
    if cfg.MODEL.GN.BACKBONE and cfg.MODEL.BACKBONE.NAME != "build_gn_backbone":
        raise InputError(
            f"MODEL.GN.BACKBONE changes nothing, as MODEL.BACKBONE.NAME is "
            f"{cfg.MODEL.BACKBONE.NAME}; only build_gn_backbone reads it"
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


def _hand_over(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    steps, freeze_at = cfg.MODEL.GN.HAND_OVER_STEPS, cfg.MODEL.BACKBONE.FREEZE_AT
    frozen = [name for name, norm in hand_overs(model) if not norm.weight.requires_grad]
    if frozen and freeze_at > 0:
        raise InputError(
            f"MODEL.GN.HAND_OVER_STEPS {steps} and MODEL.BACKBONE.FREEZE_AT {freeze_at}: "
            f"{frozen[0]} would become GN, and what feeds it could not adapt; set FREEZE_AT to 0"
        )
    return [HandOverHook(model, steps)] if steps else []


def _precise_bn(cfg: CfgNode, model: nn.Module) -> list[HookBase]:
    """Detectron2's hook for TEST.PRECISE_BN, with a loader that does not affect the training."""
    if not cfg.TEST.PRECISE_BN.ENABLED:
        return []
    if not get_bn_modules(model):
        raise InputError(
            "TEST.PRECISE_BN.ENABLED computes the statistics of BN anew, and no BN of this model "
            "trains; set it to False"
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    num_iter = cfg.TEST.PRECISE_BN.NUM_ITER
    return [hooks.PreciseBN(cfg.TEST.EVAL_PERIOD, model, build_train_loader(cfg), num_iter)]


def prepare_model(model: nn.Module, *, channels_last: bool, compile_backbone: bool) -> None:
    """Give a built model its memory format and exact boxes, and compile its backbone, in place.

    Names of modules and weights stay.

    Args:
        model: a detector.
        channels_last: whether convolutions and their features are in that order.
        compile_backbone: whether ``model.backbone`` runs through torch.compile.

    Raises:
        InputError: a backbone is to be compiled, and the model has none, recomputes, or is to be
            handed over to GN.
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
        if any(hand_overs(model)):
            raise InputError("a hand-over to GN and torch.compile cannot be combined")
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
