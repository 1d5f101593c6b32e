"""The schedule of a run, from the reference that its config states and the GPUs that it has."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from gn_det.errors import InputError
from gn_det.text import table

__all__ = [
    "Schedule",
    "rescale_schedule",
    "resolve_lazy_schedule",
    "resolve_schedule",
    "schedule_table",
]


@dataclass(frozen=True)
class Schedule:
    """What of a config depends on how many images per step has.

    Attributes:
        ims_per_gpu: images on each GPU at a time; 0 takes the other numbers as they stand.
        accumulate_steps: batches in each step.
        ims_per_batch: images of a step of the reference; of a resolved schedule, those on all GPUs
            at a time.
        lr: learning rate after warm-up; None where a LazyConfig leaves it to the optimizer.
        max_iter, steps, warmup_iters: iterations of the run, where the learning rate falls, and of
            the warm-up.
        checkpoint_period, eval_period: in iterations, 0 for none on the way.
        clip_type, clip_value: of gradients, "norm" or "value"; "" for none.
        hand_over_steps: iterations in which GN takes over from frozen BN, 0 for none.
    """

    ims_per_gpu: int
    accumulate_steps: int
    ims_per_batch: int
    lr: float | None
    max_iter: int
    steps: tuple[int, ...]
    warmup_iters: int
    checkpoint_period: int
    eval_period: int
    clip_type: str = ""
    clip_value: float = 0.0
    hand_over_steps: int = 0

    def resolve(self, world_size: int) -> Schedule:
        """The schedule of steps of ``world_size * ims_per_gpu * accumulate_steps`` images.

        The learning rate is in proportion to them (Goyal et al. 2017, arXiv 1706.02677, section
        2.1), and what is in iterations in inverse proportion, so that each is after as many images
        as in the reference. Clipping by norm follows the noise of a mean over fewer images, with
        the inverse square root; by value it stays.

        Args:
            world_size: GPUs on all machines.

        Returns:
            The schedule of the run, with ims_per_gpu 0; itself where that is 0 already.

        Raises:
            InputError: world_size, ims_per_gpu, accumulate_steps or ims_per_batch is too low or no
                whole number.
        """
        _check("SOLVER.ACCUMULATE_STEPS", "train.accumulate_steps", self.accumulate_steps, 1)
        _check("SOLVER.IMS_PER_GPU", "train.ims_per_gpu", self.ims_per_gpu, 0)
        if self.ims_per_gpu == 0:
            return self
        batch_size = "dataloader.train.total_batch_size"
        _check("SOLVER.IMS_PER_BATCH", batch_size, self.ims_per_batch, 1)
        if world_size < 1:
            raise InputError("--num-gpus and --num-machines must be at least 1")
        ims_per_batch = world_size * self.ims_per_gpu
        scale = ims_per_batch * self.accumulate_steps / self.ims_per_batch

        def scaled(iterations: int) -> int:
            # Rounded as Detectron2's auto_scale_workers does, but never to 0, which is "none".
            return max(1, round(iterations / scale)) if iterations > 0 else iterations

        return replace(
            self,
            ims_per_gpu=0,
            ims_per_batch=ims_per_batch,
            lr=self.lr * scale,
            max_iter=scaled(self.max_iter),
            steps=tuple(map(scaled, self.steps)),
            warmup_iters=scaled(self.warmup_iters),
            checkpoint_period=scaled(self.checkpoint_period),
            eval_period=scaled(self.eval_period),
            clip_value=self.clip_value / (math.sqrt(scale) if self.clip_type == "norm" else 1),
            hand_over_steps=scaled(self.hand_over_steps),
        )


def resolve_schedule(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale the schedule of a YAML config to SOLVER.IMS_PER_GPU images on each GPU.

    The other SOLVER keys state a reference: IMS_PER_BATCH images per step, 16 in Detectron2's
    schedules, with the learning rate and the iterations for that. What is made of them:
    :meth:`Schedule.resolve`.

    Args:
        cfg: the whole config; not changed.
        world_size: GPUs on all machines.

    Returns:
        A config whose numbers are those of the run: IMS_PER_BATCH images at a time, IMS_PER_GPU 0.
        cfg itself where IMS_PER_GPU is 0 already.

    Raises:
        InputError: what :meth:`Schedule.resolve` refuses, or REFERENCE_WORLD_SIZE, Detectron2's
            other way to scale, in the same config.
    """
    reference = _read_yaml(cfg)
    run = reference.resolve(world_size)
    if run is reference:
        return cfg
    if cfg.SOLVER.REFERENCE_WORLD_SIZE:
        raise InputError(
            f"SOLVER.IMS_PER_GPU {cfg.SOLVER.IMS_PER_GPU} and SOLVER.REFERENCE_WORLD_SIZE "
            f"{cfg.SOLVER.REFERENCE_WORLD_SIZE} both scale the schedule; set one of them to 0"
        )
    cfg = cfg.clone()
    cfg.defrost()
    solver = cfg.SOLVER
    solver.IMS_PER_GPU, solver.IMS_PER_BATCH = run.ims_per_gpu, run.ims_per_batch
    solver.BASE_LR, solver.WARMUP_ITERS = run.lr, run.warmup_iters
    solver.MAX_ITER, solver.STEPS = run.max_iter, run.steps
    solver.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD = run.checkpoint_period, run.eval_period
    solver.CLIP_GRADIENTS.CLIP_VALUE = run.clip_value
    cfg.MODEL.GN.HAND_OVER_STEPS = run.hand_over_steps
    return cfg


def resolve_lazy_schedule(cfg: DictConfig, world_size: int) -> DictConfig:
    """Scale the schedule of a LazyConfig to train.ims_per_gpu images on each GPU.

    As :func:`resolve_schedule`, from dataloader.train.total_batch_size images per step,
    optimizer.lr, train.max_iter and the periods. lr_multiplier, which is in fractions of the run,
    stays.

    Args:
        cfg: the whole config; not changed. Without ims_per_gpu, accumulate_steps or
            hand_over_steps, they are 0, 1 and 0.
        world_size: GPUs on all machines.

    Returns:
        A config whose numbers are those of the run: total_batch_size images at a time, ims_per_gpu
        0. cfg itself where ims_per_gpu is 0 already.

    Raises:
        InputError: what :meth:`Schedule.resolve` refuses, or an optimizer without lr.
    """
    reference = _read_lazy(cfg)
    if reference.ims_per_gpu and reference.lr is None:
        raise InputError("train.ims_per_gpu scales optimizer.lr, which the config leaves out")
    run = reference.resolve(world_size)
    if run is reference:
        return cfg
    cfg = copy.deepcopy(cfg)
    OmegaConf.resolve(cfg.lr_multiplier)  # it may refer to the reference's max_iter
    cfg.dataloader.train.total_batch_size = run.ims_per_batch
    cfg.optimizer.lr = run.lr
    cfg.train.update(
        ims_per_gpu=run.ims_per_gpu, max_iter=run.max_iter, eval_period=run.eval_period
    )
    cfg.train.checkpointer.period = run.checkpoint_period
    if run.hand_over_steps:
        cfg.train.hand_over_steps = run.hand_over_steps
    return cfg


def rescale_schedule(cfg: CfgNode, max_iter: int) -> CfgNode:
    """The schedule of a YAML config in so many iterations: warm-up, hand-over, steps and periods.

    Args:
        cfg: not changed.
        max_iter: iterations, of the reference where the config states one.
    """
    cfg = cfg.clone()
    cfg.defrost()
    solver, gn, before = cfg.SOLVER, cfg.MODEL.GN, cfg.SOLVER.MAX_ITER

    def scaled(iterations: int) -> int:
        return max(1, iterations * max_iter // before) if iterations > 0 else iterations

    solver.MAX_ITER, solver.STEPS = max_iter, tuple(sorted({*map(scaled, solver.STEPS)}))
    solver.WARMUP_ITERS = scaled(solver.WARMUP_ITERS)
    solver.CHECKPOINT_PERIOD = scaled(solver.CHECKPOINT_PERIOD)
    cfg.TEST.EVAL_PERIOD = scaled(cfg.TEST.EVAL_PERIOD)
    gn.HAND_OVER_STEPS = scaled(gn.HAND_OVER_STEPS)
    return cfg


def schedule_table(
    reference: CfgNode | DictConfig, resolved: CfgNode | DictConfig, world_size: int
) -> str:
    """What became of a config's schedule, beside what the config states."""
    before, after = map(_read, (reference, resolved))
    gpu, accumulate = after.ims_per_batch // world_size, after.accumulate_steps
    step = f"{gpu * world_size * accumulate} = {gpu} x {world_size} GPUs"
    rows = [
        [
            "images per step",
            str(before.ims_per_batch),
            step + (f" x {accumulate} accumulated" if accumulate > 1 else ""),
        ]
    ]
    for title, value in {
        "learning rate": lambda s: f"{s.lr:g}",
        "warm-up": lambda s: f"{s.warmup_iters}",
        "learning rate / 10 at": lambda s: ", ".join(map(str, s.steps)) or "never",
        "iterations": lambda s: f"{s.max_iter}",
        "checkpoint every": lambda s: f"{s.checkpoint_period}",
        "evaluation every": lambda s: f"{s.eval_period or 'at the end'}",
        "gradients clipped at": _clipping,
        "hand-over": lambda s: f"{s.hand_over_steps or 'none'}",
    }.items():
        rows.append([title, value(before), value(after)])
    return table(rows, ["", "reference", "this run"], disable_numparse=True)


def _clipping(schedule: Schedule) -> str:
    return f"{schedule.clip_type} {schedule.clip_value:g}" if schedule.clip_type else "not"


def _read(cfg: CfgNode | DictConfig) -> Schedule:
    return _read_yaml(cfg) if isinstance(cfg, CfgNode) else _read_lazy(cfg)


def _read_yaml(cfg: CfgNode) -> Schedule:
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    return Schedule(
        ims_per_gpu=solver.IMS_PER_GPU,
        accumulate_steps=solver.ACCUMULATE_STEPS,
        ims_per_batch=solver.IMS_PER_BATCH,
        lr=solver.BASE_LR,
        max_iter=solver.MAX_ITER,
        steps=tuple(solver.STEPS),
        warmup_iters=solver.WARMUP_ITERS,
        checkpoint_period=solver.CHECKPOINT_PERIOD,
        eval_period=cfg.TEST.EVAL_PERIOD,
        clip_type=clip.CLIP_TYPE if clip.ENABLED else "",
        clip_value=clip.CLIP_VALUE,
        hand_over_steps=cfg.MODEL.GN.HAND_OVER_STEPS,
    )


def _read_lazy(cfg: DictConfig) -> Schedule:
    # A config to evaluate with needs neither an lr_multiplier nor an optimizer.
    train, multiplier = cfg.train, cfg.get("lr_multiplier", {})
    after_warmup = multiplier.get("scheduler", multiplier)
    milestones = list(after_warmup.get("milestones") or ())
    # fvcore takes the last milestone where the end is not given.
    end = after_warmup.get("num_updates") or (milestones.pop() if milestones else None)
    return Schedule(
        ims_per_gpu=train.get("ims_per_gpu", 0),
        accumulate_steps=train.get("accumulate_steps", 1),
        ims_per_batch=cfg.dataloader.train.total_batch_size,
        lr=cfg.get("optimizer", {}).get("lr"),
        max_iter=train.max_iter,
        steps=tuple(round(step / end * train.max_iter) for step in milestones),
        warmup_iters=round(multiplier.get("warmup_length", 0) * train.max_iter),
        checkpoint_period=train.checkpointer.period,
        eval_period=train.eval_period,
        hand_over_steps=train.get("hand_over_steps", 0),
    )


def _check(key: str, lazy_key: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise InputError(
            f"{key} is {value} ({lazy_key} for a LazyConfig); it has to be a whole number of at "
            f"least {least}"
        )
