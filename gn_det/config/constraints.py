"""What values config keys can have: checked when a config is read, before anything is built."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from gn_det.errors import InputError
from gn_det.utils import nearest

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from omegaconf import DictConfig

__all__ = ["check_complete_config", "check_config", "check_lazy_config"]

Rule = Callable[[Any], str]  # what a value has to be; empty where it is

# How the field's other libraries, and hands in a hurry, write the names of norms.
_NORMS = ("", "BN", "SyncBN", "FrozenBN", "GN", "LN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")
_NORM_ALIASES = {"groupnorm": "GN", "batchnorm": "BN", "batchnorm2d": "BN", "layernorm": "LN"}


def at_least(least: float) -> Rule:
    return lambda value: "" if _is_number(value) and value >= least else f"at least {least}"


def above(limit: float) -> Rule:
    return lambda value: "" if _is_number(value) and value > limit else f"above {limit}"


def between(low: float, high: float) -> Rule:
    def rule(value: Any) -> str:
        return "" if _is_number(value) and low <= value <= high else f"from {low} to {high}"

    return rule


def whole(low: int, high: int = 2**31 - 1) -> Rule:
    def rule(value: Any) -> str:
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        fits = is_whole and low <= value <= high
        return "" if fits else f"a whole number from {low} to {high}"

    return rule


def one_of(*choices: Any) -> Rule:
    def rule(value: Any) -> str:
        if value in choices:
            return ""
        names = [repr(choice) if choice == "" else str(choice) for choice in choices]
        return f"one of {', '.join(names)}{nearest(str(value), names)}"

    return rule


def each(rule: Rule, least: int = 1) -> Rule:
    """Of a list with at least so many items."""

    def of_each(values: Any) -> str:
        if not isinstance(values, (list, tuple)) or len(values) < least:
            return f"a list of at least {least}"
        return next((f"a list of which each is {wrong}" for v in values if (wrong := rule(v))), "")

    return of_each


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _norm(value: Any) -> str:
    if value in _NORMS:
        return ""
    meant = {name.lower(): name for name in _NORMS} | _NORM_ALIASES
    known = meant.get(str(value).lower())
    hint = f"; did you mean {known}?" if known else ""
    return f"one of {', '.join(name or repr(name) for name in _NORMS)}{hint}"


def _device(value: Any) -> str:
    return "" if re.fullmatch(r"cpu|cuda(:\d+)?|meta", str(value)) else "cpu, cuda or cuda:N"


def _not_empty(value: Any) -> str:
    return "" if value else "not empty"


def _increasing(values: Any) -> str:
    rises = all(map(_is_number, values)) and all(a <= b for a, b in pairwise(values))
    return "" if rises else "numbers in increasing order"


def _value_range(values: Any) -> str:
    is_range = len(values) in (0, 2) and all(map(_is_number, values))
    rises = is_range and (not values or values[0] < values[1])
    return "" if rises else "[low, high], or []"


def _registered(registry: str, *others: str) -> Rule:
    """A name of one of Detectron2's registries, in detectron2.modeling."""

    def rule(value: Any) -> str:
        import detectron2.modeling

        names = [name for name, _ in getattr(detectron2.modeling, registry)]
        return one_of(*others, *names)(value) and (
            f"a name of Detectron2's {registry}{nearest(str(value), names)}"
        )

    return rule


def _is_expectation(row: Any) -> bool:
    return isinstance(row, (list, tuple)) and len(row) == 4 and all(map(_is_number, row[2:]))


def _timm_name(value: Any) -> str:
    from gn_det.modeling.timm_backbone.names import timm_name_problem

    return timm_name_problem(value) if value else ""


_STAGES = each(one_of("stem", "res2", "res3", "res4", "res5", "linear"))
_BOX_LOSS = one_of("smooth_l1", "giou", "diou", "ciou")
_THRESHOLDS = each(between(0, 1))
_LABELS = each(one_of(-1, 0, 1))
_SEED = between(-1, 2**31 - 1)
_NUM_WORKERS = whole(0, 256)  # of each process; more take a machine down before they load anything

_RULES: dict[str, Rule] = {
    "OUTPUT_DIR": _not_empty,
    "SEED": _SEED,
    "DATALOADER.NUM_WORKERS": _NUM_WORKERS,
    "DATALOADER.REPEAT_THRESHOLD": at_least(0),
    "DATALOADER.SAMPLER_TRAIN": one_of(
        "TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"
    ),
    "INPUT.FORMAT": one_of("BGR", "RGB", "L", "YUV-BT.601"),
    "INPUT.MASK_FORMAT": one_of("polygon", "bitmask"),
    "INPUT.VALUE_RANGE": _value_range,
    "INPUT.RANDOM_FLIP": one_of("none", "horizontal", "vertical"),
    "INPUT.MIN_SIZE_TRAIN": each(at_least(1)),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": one_of("choice", "range"),
    "INPUT.MAX_SIZE_TRAIN": at_least(1),
    "INPUT.MIN_SIZE_TEST": at_least(0),
    "INPUT.MAX_SIZE_TEST": at_least(1),
    "INPUT.CROP.TYPE": one_of("relative_range", "relative", "absolute", "absolute_range"),
    "INPUT.CROP.SIZE": each(above(0), 2),
    "MODEL.DEVICE": _device,
    "MODEL.META_ARCHITECTURE": _registered("META_ARCH_REGISTRY"),
    "MODEL.BACKBONE.NAME": _registered("BACKBONE_REGISTRY"),
    "MODEL.BACKBONE.FREEZE_AT": between(0, 5),
    "MODEL.PROPOSAL_GENERATOR.NAME": _registered(
        "PROPOSAL_GENERATOR_REGISTRY", "PrecomputedProposals"
    ),
    "MODEL.RPN.HEAD_NAME": _registered("RPN_HEAD_REGISTRY"),
    "MODEL.ANCHOR_GENERATOR.NAME": _registered("ANCHOR_GENERATOR_REGISTRY"),
    "MODEL.ANCHOR_GENERATOR.SIZES": each(each(above(0))),
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": each(each(above(0))),
    "MODEL.ROI_HEADS.NAME": _registered("ROI_HEADS_REGISTRY"),
    "MODEL.ROI_HEADS.NUM_CLASSES": at_least(1),
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.ROI_HEADS.IOU_LABELS": _LABELS,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": between(0, 1),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": between(0, 1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": between(0, 1),
    "MODEL.ROI_HEADS.IN_FEATURES": each(_not_empty),
    "MODEL.ROI_BOX_HEAD.NAME": _registered("ROI_BOX_HEAD_REGISTRY", ""),
    "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": each(above(0), 4),
    "MODEL.ROI_BOX_HEAD.CONV_DIM": at_least(1),
    "MODEL.ROI_BOX_HEAD.FC_DIM": at_least(1),
    "MODEL.ROI_BOX_HEAD.NUM_CONV": at_least(0),
    "MODEL.ROI_BOX_HEAD.NUM_FC": at_least(0),
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": at_least(1),
    "MODEL.ROI_MASK_HEAD.NAME": _registered("ROI_MASK_HEAD_REGISTRY"),
    "MODEL.ROI_MASK_HEAD.CONV_DIM": at_least(1),
    "MODEL.ROI_MASK_HEAD.NUM_CONV": at_least(0),
    "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": at_least(1),
    "MODEL.ROI_KEYPOINT_HEAD.NAME": _registered("ROI_KEYPOINT_HEAD_REGISTRY"),
    "MODEL.SEM_SEG_HEAD.NAME": _registered("SEM_SEG_HEADS_REGISTRY"),
    "MODEL.RETINANET.NUM_CLASSES": at_least(1),
    "MODEL.RESNETS.DEPTH": one_of(18, 34, 50, 101, 152),
    "MODEL.RESNETS.OUT_FEATURES": _STAGES,
    "MODEL.RESNETS.RES5_DILATION": one_of(1, 2),
    "MODEL.RESNETS.NUM_GROUPS": at_least(1),
    "MODEL.RESNETS.WIDTH_PER_GROUP": at_least(1),
    "MODEL.FPN.OUT_CHANNELS": at_least(1),
    "MODEL.FPN.FUSE_TYPE": one_of("sum", "avg"),
    "MODEL.RPN.IN_FEATURES": each(_not_empty),
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": _BOX_LOSS,
    "MODEL.RPN.CONV_DIMS": each(lambda n: "" if n == -1 else at_least(1)(n)),
    "MODEL.RPN.IOU_THRESHOLDS": _THRESHOLDS,
    "MODEL.RPN.IOU_LABELS": _LABELS,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.RPN.POSITIVE_FRACTION": between(0, 1),
    "MODEL.RPN.NMS_THRESH": between(0, 1),
    "MODEL.PIXEL_MEAN": each(lambda value: "" if _is_number(value) else "a number"),
    "MODEL.PIXEL_STD": each(above(0)),
    "MODEL.GN.SITES": each(_not_empty),
    "MODEL.GN.NUM_GROUPS": at_least(1),
    "MODEL.GN.CHANNELS_PER_GROUP": at_least(0),
    "MODEL.GN.MIN_CHANNELS_PER_GROUP": at_least(1),
    "MODEL.GN.HAND_OVER_STEPS": at_least(0),
    "MODEL.TIMM.NAME": _timm_name,
    "MODEL.TIMM.OUT_INDICES": each(lambda value: "" if type(value) is int else "a whole number", 0),
    "MODEL.TIMM.NORM": one_of("FrozenBN", "BN", "GN"),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.MAX_ITER": whole(1),
    "SOLVER.BASE_LR": above(0),
    "SOLVER.STEPS": lambda steps: _increasing(steps) or each(at_least(0), 0)(steps),
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
    "TEST.EXPECTED_RESULTS": each(
        lambda row: "" if _is_expectation(row) else "[task, metric, value, tolerance]", 0
    ),
    "TEST.AUG.MAX_SIZE": at_least(1),
    "TEST.AUG.MIN_SIZES": each(at_least(1)),
    "TEST.PRECISE_BN.NUM_ITER": at_least(1),
    "TEST.DETECTIONS_PER_IMAGE": lambda n: "" if n == -1 else at_least(1)(n),
}
for _part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD", "RETINANET"):
    _RULES[f"MODEL.{_part}.NORM"] = _norm
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
    "train.output_dir": _not_empty,
    "train.device": _device,
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
    _raise(f"{key} is null; leave it out, and it has its default" for key in nulls)
    _raise(_wrong(key, value_of(key), rule) for key, rule in _RULES.items())


def _nulls(cfg: CfgNode) -> Iterator[str]:
    """Keys without a value, which CfgNode takes in the place of any."""
    for key, value in cfg.items():
        if isinstance(value, Mapping):
            yield from (f"{key}.{below}" for below in _nulls(value))
        elif value is None:
            yield key


def check_complete_config(cfg: CfgNode) -> None:
    """Check those values of a YAML config that have to fit each other.

    Raises:
        InputError: with both.
    """
    _raise(_wrong_together(cfg))


def check_lazy_config(cfg: DictConfig) -> None:
    """Check those values of a LazyConfig that have the names of Detectron2's common configs.

    Raises:
        InputError: see :func:`check_config`.
    """
    from omegaconf import OmegaConf

    absent = object()
    values = {key: OmegaConf.select(cfg, key, default=absent) for key in _LAZY_RULES}
    _raise(
        _wrong(key, value, _LAZY_RULES[key])
        for key, value in values.items()
        if value is not absent and value is not None
    )
    train = cfg.get("train", {})
    steps, max_iter = (train.get(key) for key in ("hand_over_steps", "max_iter"))
    if steps and max_iter:
        _raise([_ends_before("train.hand_over_steps", steps, "train.max_iter", max_iter)])


def _wrong(key: str, value: Any, rule: Rule) -> str:
    has_to_be = rule(value)
    return f"{key} is {value!r}, and has to be {has_to_be}" if has_to_be else ""


def _ends_before(key: str, hand_over_steps: int, end: str, max_iter: int) -> str:
    if hand_over_steps <= max_iter:
        return ""
    return f"{key} {hand_over_steps} is above {end} {max_iter}: the norms would not become GN"


def _of_resnets_alone(resnets: CfgNode) -> str:
    """What a config sets of Detectron2's ResNets, where a model of timm takes their place."""
    from detectron2.config import get_cfg

    defaults = get_cfg().MODEL.RESNETS
    given = [
        f"MODEL.RESNETS.{key} {value!r}"
        for key, value in resnets.items()
        if key != "OUT_FEATURES" and value != defaults.get(key, value)
    ]
    if not given:
        return ""
    change = "changes" if len(given) == 1 else "change"
    return (
        f"{', '.join(given)} {change} nothing in a backbone of timm: use MODEL.TIMM.NAME and "
        "MODEL.TIMM.NORM, and leave MODEL.RESNETS as Detectron2 has it"
    )


def _wrong_together(cfg: CfgNode) -> Iterable[str]:
    model = cfg.MODEL
    if len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        yield (
            f"MODEL.PIXEL_MEAN {model.PIXEL_MEAN} and MODEL.PIXEL_STD {model.PIXEL_STD} have "
            "different numbers of channels"
        )
    if model.BACKBONE.NAME.startswith("build_timm_") != bool(model.TIMM.NAME):
        yield (
            f"MODEL.BACKBONE.NAME is {model.BACKBONE.NAME}, and MODEL.TIMM.NAME "
            f"{model.TIMM.NAME!r}; build_timm_fpn_backbone and its like go with a model of timm"
        )
    has_res5_head = model.META_ARCHITECTURE.endswith("RCNN") and (
        model.ROI_HEADS.NAME == "Res5ROIHeads"
    )
    if model.TIMM.NAME and not has_res5_head:
        yield _of_resnets_alone(model.RESNETS)
    hand_over = model.GN.HAND_OVER_STEPS
    yield _ends_before(
        "MODEL.GN.HAND_OVER_STEPS", hand_over, "SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER
    )
    for key, on in (
        ("GN.RECOMPUTE", model.GN.RECOMPUTE),
        ("GN.WEIGHT_STANDARDIZATION", model.GN.WEIGHT_STANDARDIZATION),
        ("BACKBONE.COMPILE", model.BACKBONE.COMPILE),
    ):
        if hand_over and on:
            yield f"MODEL.GN.HAND_OVER_STEPS {hand_over} and MODEL.{key} cannot be combined"
    sizes = cfg.INPUT.MIN_SIZE_TRAIN
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range" and len(sizes) != 2:
        yield f"INPUT.MIN_SIZE_TRAIN {sizes} is no range: MIN_SIZE_TRAIN_SAMPLING takes two sizes"
    for split, shorter in (("TRAIN", sizes), ("TEST", [cfg.INPUT.MIN_SIZE_TEST])):
        longer = cfg.INPUT[f"MAX_SIZE_{split}"]
        if longer < min(shorter):
            yield (
                f"INPUT.MAX_SIZE_{split} {longer} limits the longer side, and is below "
                f"MIN_SIZE_{split} {min(shorter)}, the shorter side"
            )
    if (model.ANCHOR_GENERATOR.NAME == "RotatedAnchorGenerator") != (
        model.PROPOSAL_GENERATOR.NAME == "RRPN"
    ):
        yield (
            f"MODEL.ANCHOR_GENERATOR.NAME is {model.ANCHOR_GENERATOR.NAME}, and "
            f"MODEL.PROPOSAL_GENERATOR.NAME {model.PROPOSAL_GENERATOR.NAME}; RRPN and "
            "RotatedAnchorGenerator go together"
        )
    if model.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals" and not model.LOAD_PROPOSALS:
        yield "MODEL.PROPOSAL_GENERATOR.NAME PrecomputedProposals needs MODEL.LOAD_PROPOSALS True"
    for part in ("RPN", "ROI_HEADS"):
        thresholds, labels = model[part].IOU_THRESHOLDS, model[part].IOU_LABELS
        if len(labels) != len(thresholds) + 1 or _increasing(thresholds):
            yield (
                f"MODEL.{part}.IOU_THRESHOLDS {thresholds} and IOU_LABELS {labels}: thresholds in "
                "increasing order, and one label more than these"
            )
    solver = cfg.SOLVER
    if solver.NESTEROV and not solver.MOMENTUM:
        yield "SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0"
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR" and solver.BASE_LR_END > solver.BASE_LR:
        yield f"SOLVER.BASE_LR_END {solver.BASE_LR_END} is above SOLVER.BASE_LR {solver.BASE_LR}"
    if (
        solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR"
        and not 0 <= solver.NUM_DECAYS < solver.MAX_ITER
    ):
        yield (
            f"SOLVER.NUM_DECAYS {solver.NUM_DECAYS} decays do not fit into SOLVER.MAX_ITER "
            f"{solver.MAX_ITER} iterations"
        )
    if model.META_ARCHITECTURE.endswith("RCNN"):
        features = model.RPN.IN_FEATURES
        for name in ("SIZES", "ASPECT_RATIOS"):
            anchors = model.ANCHOR_GENERATOR[name]
            if len(anchors) not in (1, len(features)):
                yield (
                    f"MODEL.ANCHOR_GENERATOR.{name} has {len(anchors)} lists, and "
                    f"MODEL.RPN.IN_FEATURES {len(features)} levels: give one list, or one for each"
                )
    cropped = cfg.INPUT.CROP.ENABLED and model.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
    if cropped and importlib.util.find_spec("shapely") is None:
        yield (
            "INPUT.CROP.ENABLED cuts polygons, which needs the package shapely: install it, or set "
            "INPUT.MASK_FORMAT to bitmask"
        )


def _raise(wrong: Iterable[str]) -> None:
    found = [each for each in wrong if each]
    if found:
        raise InputError("; ".join(found))
