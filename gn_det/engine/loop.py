"""The one training loop, of detectors by YAML and LazyConfig and of classifiers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from typing import Any

from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.common.param_scheduler import ParamScheduler
from torch.optim.lr_scheduler import LRScheduler

from gn_det.checkpoint import Checkpointer
from gn_det.data.train_loader import TrainLoader
from gn_det.engine.step import AccumulatingTrainer
from gn_det.engine.termination import TerminationHook
from gn_det.errors import InputError

__all__ = ["fit"]


def fit(
    trainer: AccumulatingTrainer,
    checkpointer: Checkpointer,
    scheduler: ParamScheduler | LRScheduler,
    max_iter: int,
    *,
    weights: str,
    resume: bool,
    checkpoint_period: int,
    max_to_keep: int | None = None,
    evaluate: Callable[[], dict[str, Any]] | None = None,
    eval_period: int = 0,
    writers: Sequence[EventWriter] = (),
    log_period: int = 20,
    more_hooks: Sequence[HookBase] = (),
    termination: TerminationHook | None = None,
    on_start: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train from weights or from the last checkpoint to the last iteration.

    SIGTERM, SIGHUP and Ctrl-C save a checkpoint and end the process, see :class:`TerminationHook`.
    A :class:`TrainLoader` begins at the batch that a resumed run has reached.

    Args:
        trainer: with the model, the batches and the optimizer.
        checkpointer: of the model, with the trainer's state.
        scheduler: of the learning rate.
        max_iter: steps in all.
        weights: to start from; empty for the model as it is.
        resume: whether to continue from the last checkpoint, if there is one.
        checkpoint_period: steps from one checkpoint to the next.
        max_to_keep: checkpoints besides the final one; None for all.
        evaluate: returns a nested dict of metrics, for Detectron2's EvalHook.
        eval_period: steps from one evaluation to the next; 0 for one at the end.
        writers: of the metrics; none on processes that are not the main one.
        log_period: steps from one writing to the next.
        more_hooks: run after the scheduler and before the checkpoint, which holds their state.
        termination: the hook of these signals, where more_hooks evaluate inside it.
        on_start: called when the weights are loaded, before the first step.

    Returns:
        What the last evaluation returned; empty without one.
    """
    termination = termination or TerminationHook(checkpointer)
    results: dict[str, Any] = {}

    def evaluate_and_keep() -> dict[str, Any]:
        results.clear()
        results.update(termination.evaluating(evaluate) or {})
        return results

    main = comm.is_main_process()
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=scheduler),
            *more_hooks,
            hooks.PeriodicCheckpointer(checkpointer, checkpoint_period, max_iter, max_to_keep)
            if main
            else None,
            termination,
            hooks.EvalHook(eval_period, evaluate_and_keep) if evaluate else None,
            # Last, so that it writes what the others have measured.
            hooks.PeriodicWriter(writers, log_period) if writers else None,
        ]
    )
    checkpointer.resume_or_load(weights, resume=resume)
    start_iter = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    if start_iter > max_iter:
        raise InputError(
            f"the run has done {start_iter} iterations already, and SOLVER.MAX_ITER "
            f"(train.max_iter of a LazyConfig) is {max_iter}"
        )
    if start_iter == max_iter:
        logging.getLogger(__name__).info(f"all {max_iter} iterations are done; nothing is trained")
    if start_iter and isinstance(scheduler, LRMultiplier):
        _take_learning_rates(scheduler)
    loader = trainer.data_loader
    if isinstance(loader, TrainLoader):
        loader.start = start_iter * trainer.accumulate_steps
    elif start_iter > 0:
        logging.getLogger(__name__).warning(
            f"{type(loader).__name__} starts from its first batch: this run will differ from an "
            "uninterrupted one"
        )
    if on_start is not None:
        on_start()
    try:
        with closing(loader) if isinstance(loader, TrainLoader) else nullcontext():
            trainer.train(start_iter, max_iter)
    finally:
        termination.release()
    return results


def _take_learning_rates(scheduler: LRMultiplier) -> None:
    """Let a scheduler that comes from a checkpoint follow the learning rates of the config."""
    groups = scheduler.optimizer.param_groups
    scheduler.base_lrs = [group["initial_lr"] for group in groups]
    for group, lr in zip(groups, scheduler.get_lr(), strict=True):
        group["lr"] = lr
