"""What values config keys can have: checked when a config is read, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gn_det.config.combinations import ends_before, refuse
from gn_det.config.rules import (
    Rule,
    above,
    at_least,
    between,
    device_name,
    each,
    expected_result,
    folder,
    increasing,
    norm_name,
    not_empty,
    number,
    one_of,
    registered_name,
    timm_name,
    value_range,
    whole,
)

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from omegaconf import DictConfig

__all__ = ["check_config", "check_lazy_config"]


_STAGES = each(one_of("stem", "res2", "res3", "res4", "res5", "linear"))
_BOX_LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
_THRESHOLDS = each(between(0, 1))
_LABELS = each(one_of(-1, 0, 1))
_SEED = between(-1, 2**31 - 1)
_NUM_WORKERS = whole(0, 256)  # of each process; more take a machine down before they load anything

_RULES: dict[str, Rule] = {
    "OUTPUT_DIR": folder,
    "SEED": _SEED,
    "DATALOADER.NUM_WORKERS": _NUM_WORKERS,
    "DATALOADER.REPEAT_THRESHOLD": at_least(0),
    "DATALOADER.SAMPLER_TRAIN": one_of(
        "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"
    ),
    "INPUT.FORMAT": one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.VALUE_RANGE": value_range,
    "INPUT.RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN": each(at_least(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": at_least(1),
    "INPUT.MIN_SIZE_TEST": at_least(0),
    "INPUT.MAX_SIZE_TEST": at_least(1),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": each(above(0), 2),
    "MODEL.DEVICE": device_name,
    "MODEL.META_ARCHITECTURE": registered_name("META_ARCH_REGISTRY"),
    "MODEL.BACKBONE.NAME": registered_name("BACKBONE_REGISTRY"),
    "MODEL.BACKBONE.FREEZE_AT": between(0, 5),
    "MODEL.PROPOSAL_GENERATOR.NAME": registered_name(
        "PROPOSAL_GENERATOR_REGISTRY", "PrecomputedProposals"
    ),
    "MODEL.RPN.HEAD_NAME": registered_name("RPN_HEAD_REGISTRY"),
    "MODEL.ANCHOR_GENERATOR.NAME": registered_name("ANCHOR_GENERATOR_REGISTRY"),
    "MODEL.ANCHOR_GENERATOR.SIZES": each(each(above(0))),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": each(each(above(0))),
    "MODEL.ROI_HEADS.NAME": registered_name("ROI_HEADS_REGISTRY"),
    "MODEL.ROI_HEADS.NUM_CLASSES": at_least(1),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": between(0, 1),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": between(0, 1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": between(0, 1),
    "MODEL.ROI_HEADS.IN_FEATURES": each(not_empty),
    "MODEL.ROI_BOX_HEAD.NAME": registered_name("ROI_BOX_HEAD_REGISTRY", ""),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": each(above(0), 4),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": at_least(1),
    "MODEL.ROI_BOX_HEAD.FC_DIM": at_least(1),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": at_least(0),
    "MODEL.ROI_BOX_HEAD.NUM_FC": at_least(0),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": at_least(1),
    "MODEL.ROI_MASK_HEAD.NAME": registered_name("ROI_MASK_HEAD_REGISTRY"),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": at_least(1),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": at_least(0),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": at_least(1),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": registered_name("ROI_KEYPOINT_HEAD_REGISTRY"),
    "MODEL.SEM_SEG_HEAD.NAME": registered_name("SEM_SEG_HEADS_REGISTRY"),
    "MODEL.RETINANET.NUM_CLASSES": at_least(1),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": _STAGES,
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.NUM_GROUPS": at_least(1),
    "MODEL.RESNETS.WIDTH_PER_GROUP": at_least(1),
    "MODEL.FPN.OUT_CHANNELS": at_least(1),
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.RPN.IN_FEATURES": each(not_empty),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.CONV_DIMS": each(lambda n: "" if n == -1 else at_least(1)(n)),
    "MODEL.RPN.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.RPN.POSITIVE_FRACTION": between(0, 1),
    "MODEL.RPN.NMS_THRESH": between(0, 1),
    "MODEL.PIXEL_MEAN": each(number),
    "MODEL.PIXEL_STD": each(above(0)),
    "MODEL.GN.SITES": each(not_empty),
    "MODEL.GN.NUM_GROUPS": at_least(1),
    "MODEL.GN.CHANNELS_PER_GROUP": at_least(0),
    "MODEL.GN.MIN_CHANNELS_PER_GROUP": at_least(1),
    "MODEL.GN.HAND_OVER_STEPS": at_least(0),
    "MODEL.TIMM.NAME": timm_name,
    "MODEL.TIMM.OUT_INDICES": each(lambda value: "" if type(value) is int else "a whole number", 0),
    "MODEL.TIMM.NORM": one_of("FrozenBN", "BN", "GN"),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.MAX_ITER": whole(1),
    "SOLVER.BASE_LR": above(0),
    "SOLVER.STEPS": lambda steps: increasing(steps) or each(at_least(0), 0)(steps),
    "SOLVER.REFERENCE_WORLD_SIZE": at_least(0),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": lambda p: "" if p > 0 else "above 0",
    "SOLVER.GAMMA": above(0),
    "SOLVER.MOMENTUM": between(0, 1),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_NORM": at_least(0),
    "SOLVER.BIAS_LR_FACTOR": above(0),
    "SOLVER.BACKBONE_MULTIPLIER": above(0),
    "SOLVER.WARMUP_ITERS": at_least(0),
    "SOLVER.WARMUP_FACTOR": between(0, 1),
    "SOLVER.WARMUP_METHOD": one_of("linear", "constant"),
    "SOLVER.LR_SCHEDULER_NAME": one_of(
        "WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"
    ),
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.IMS_PER_GPU": at_least(0),
    "SOLVER.ACCUMULATE_STEPS": at_least(1),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": one_of("value", "norm"),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": above(0),
    "TEST.EVAL_PERIOD": at_least(0),
    "TEST.EXPECTED_RESULTS": each(expected_result, 0),
    "TEST.AUG.MAX_SIZE": at_least(1),
    "TEST.AUG.MIN_SIZES": each(at_least(1)),
    "TEST.PRECISE_BN.NUM_ITER": at_least(1),
    "TEST.DETECTIONS_PER_IMAGE": lambda n: "" if n == -1 else at_least(1)(n),
}
for _part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"):
    _RULES[f"MODEL.{_part}.NORM"] = norm_name
for _split in ("TRAIN", "TEST"):
    for _when in ("PRE", "POST"):
        _RULES[f"MODEL.RPN.{_when}_NMS_TOPK_{_split}"] = at_least(1)
for _head in ("ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"):
    _RULES[f"MODEL.{_head}.POOLER_TYPE"] = one_of(
        "ROIAlignV2", "ROIAlign", "ROIPool", "ROIAlignRotated"
    )

for _key in (
    "RPN.LOSS_WEIGHT", "RPN.BBOX_REG_LOSS_WEIGHT", "RPN.SMOOTH_L1_BETA",
    "ROI_BOX_HEAD.BBOX_REG_LOSS_WEIGHT", "ROI_BOX_HEAD.SMOOTH_L1_BETA",
    "ROI_KEYPOINT_HEAD.LOSS_WEIGHT", "SEM_SEG_HEAD.LOSS_WEIGHT",
    "PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", "RETINANET.SMOOTH_L1_LOSS_BETA",
    "RETINANET.FOCAL_LOSS_GAMMA",
):  # fmt: skip
    _RULES[f"MODEL.{_key}"] = at_least(0)

_LAZY_RULES: dict[str, Rule] = {
    "train.output_dir": folder,
    "train.device": device_name,
    "train.seed": _SEED,
    "train.max_iter": whole(1),
    "train.log_period": at_least(1),
    "train.checkpointer.period": at_least(1),
    "train.ims_per_gpu": at_least(0),
    "train.accumulate_steps": at_least(1),
    "train.hand_over_steps": at_least(0),
    "dataloader.train.total_batch_size": at_least(1),
    "dataloader.train.num_workers": _NUM_WORKERS,
    "dataloader.test.num_workers": _NUM_WORKERS,
    "dataloader.train.mapper.image_format": one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "dataloader.train.mapper.instance_mask_format": one_of("polygon", "bitmask"),
    "optimizer.lr": above(0),
    "optimizer.momentum": between(0, 1),
    "optimizer.weight_decay": at_least(0),
}


_MAY_BE_NULL = ("SOLVER.WEIGHT_DECAY_BIAS",)


def check_config(cfg: CfgNode) -> None:
    """Check the values of a YAML config, each by itself: a file may hold a part of one.

    Raises:
        InputError: with every key whose value cannot work, the value, and what it can be.
    """

    def value_of(key: str) -> Any:
        node = cfg
        for part in key.split("."):
            node = node[part]
        return node

    nulls = (key for key in _nulls(cfg) if key not in _MAY_BE_NULL)
    refuse(f"{key} is null; leave it out, and it has its default" for key in nulls)
    refuse(_wrong(key, value_of(key), rule) for key, rule in _RULES.items())


def _nulls(cfg: CfgNode) -> Iterator[str]:
    """Keys without a value, which CfgNode takes in the place of any."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{below}" for below in _nulls(value))
        elif value is None:
            yield key


def check_lazy_config(cfg: DictConfig) -> None:
    """Check those values of a LazyConfig that have the names of Detectron2's common configs.

    Raises:
        InputError: see :func:`check_config`.
    """
    from omegaconf import OmegaConf

    absent = object()
    values = {key: OmegaConf.select(cfg, key, default=absent) for key in _LAZY_RULES}
    refuse(
        _wrong(key, value, _LAZY_RULES[key])
        for key, value in values.items()
        if value is not absent and value is not None
    )
    train = cfg.get("train", {})
    steps, max_iter = (train.get(key) for key in ("hand_over_steps", "max_iter"))
    if steps and max_iter:
        refuse([ends_before("train.hand_over_steps", steps, "train.max_iter", max_iter)])


def _wrong(key: str, value: Any, rule: Rule) -> str:
    has_to_be = rule(value)
    return f"{key} is {value!r}, and has to be {has_to_be}" if has_to_be else ""
