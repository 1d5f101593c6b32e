"""The schedule of a run, from the reference that its config states and the GPUs that it has."""

from __future__ import annotations

import math

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from tabulate import tabulate

from gn_det.errors import InputError

__all__ = ["resolve_schedule", "schedule_table"]


def resolve_schedule(cfg: CfgNode, world_size: int) -> CfgNode:
    """Scale the schedule to SOLVER.IMS_PER_GPU images on each GPU.

    The other SOLVER keys state a reference: IMS_PER_BATCH images a step, 16 in Detectron2's
    schedules, with the learning rate and the iterations for that. A step of other size gets the
    learning rate in proportion (Goyal et al. 2017, arXiv 1706.02677, section 2.1), and iterations,
    STEPS, warm-up and the periods of checkpoints and evaluations in inverse proportion, so that
    each is after as many images as in the reference. CLIP_GRADIENTS by norm follows the noise of a
    mean over fewer images, with the inverse square root; by value it stays.

    A step is ``world_size * IMS_PER_GPU * ACCUMULATE_STEPS`` images.

    Args:
        cfg: the whole config; not changed.
        world_size: GPUs on all machines.

    Returns:
        A config whose numbers are those of the run: IMS_PER_BATCH images at a time, IMS_PER_GPU 0.
        cfg itself where IMS_PER_GPU is 0 already.

    Raises:
        InputError: negative IMS_PER_GPU, ACCUMULATE_STEPS below 1, or REFERENCE_WORLD_SIZE,
            Detectron2's other way to scale, in the same config.
    """
    solver = cfg.SOLVER
    if solver.ACCUMULATE_STEPS < 1:
        raise InputError(
            f"SOLVER.ACCUMULATE_STEPS is {solver.ACCUMULATE_STEPS}; 1 takes a step for each batch"
        )
    if solver.IMS_PER_GPU < 0:
        raise InputError(
            f"SOLVER.IMS_PER_GPU is {solver.IMS_PER_GPU}; 0 takes IMS_PER_BATCH as it is"
        )
    if solver.IMS_PER_GPU == 0:
        return cfg
    if solver.REFERENCE_WORLD_SIZE:
        raise InputError(
            f"SOLVER.IMS_PER_GPU {solver.IMS_PER_GPU} and SOLVER.REFERENCE_WORLD_SIZE "
            f"{solver.REFERENCE_WORLD_SIZE} both scale the schedule; set one of them to 0"
        )
    # Detectron2 scales by workers: the reference as one of so many with one image each.
    reference = cfg.clone()
    reference.defrost()
    reference.SOLVER.REFERENCE_WORLD_SIZE = solver.IMS_PER_BATCH
    step = world_size * solver.IMS_PER_GPU * solver.ACCUMULATE_STEPS
    scaled = DefaultTrainer.auto_scale_workers(reference, step)
    scaled.SOLVER.REFERENCE_WORLD_SIZE = 0
    scaled.SOLVER.IMS_PER_GPU = 0
    scaled.SOLVER.IMS_PER_BATCH = world_size * solver.IMS_PER_GPU
    if solver.CLIP_GRADIENTS.CLIP_TYPE != "value":
        scaled.SOLVER.CLIP_GRADIENTS.CLIP_VALUE *= math.sqrt(solver.IMS_PER_BATCH / step)
    return scaled


def schedule_table(reference: CfgNode, resolved: CfgNode, world_size: int) -> str:
    """What :func:`resolve_schedule` made of a config, beside what that states."""
    accumulate = resolved.SOLVER.ACCUMULATE_STEPS
    gpu = resolved.SOLVER.IMS_PER_BATCH // world_size
    step = f"{gpu * world_size * accumulate} = {gpu} x {world_size} GPUs"
    rows = [
        [
            "images a step",
            str(reference.SOLVER.IMS_PER_BATCH),
            step + (f" x {accumulate} accumulated" if accumulate > 1 else ""),
        ]
    ]
    for title, value in {
        "learning rate": lambda cfg: f"{cfg.SOLVER.BASE_LR:g}",
        "warm-up": lambda cfg: f"{cfg.SOLVER.WARMUP_ITERS}",
        "learning rate / 10 at": lambda cfg: ", ".join(map(str, cfg.SOLVER.STEPS)),
        "iterations": lambda cfg: f"{cfg.SOLVER.MAX_ITER}",
        "checkpoint every": lambda cfg: f"{cfg.SOLVER.CHECKPOINT_PERIOD}",
        "evaluation every": lambda cfg: f"{cfg.TEST.EVAL_PERIOD or 'at the end'}",
        "gradients clipped at": _clipping,
    }.items():
        rows.append([title, value(reference), value(resolved)])
    return tabulate(rows, ["", "reference", "this run"], disable_numparse=True)


def _clipping(cfg: CfgNode) -> str:
    clip = cfg.SOLVER.CLIP_GRADIENTS
    return f"{clip.CLIP_TYPE} {clip.CLIP_VALUE:g}" if clip.ENABLED else "not"
