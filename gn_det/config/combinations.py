"""Values of config keys that have to fit each other."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from gn_det.config.rules import increasing
from gn_det.errors import InputError

if TYPE_CHECKING:
    from detectron2.config import CfgNode

__all__ = ["check_complete_config", "ends_before", "refuse"]


def check_complete_config(cfg: CfgNode) -> None:
    """Check those values of a YAML config that have to fit each other.

    Raises:
        InputError: with both.
    """
    parts = (_backbone, _hand_over, _images, _proposals, _loader, _solver)
    refuse(chain.from_iterable(part(cfg) for part in parts))


def _backbone(cfg: CfgNode) -> Iterator[str]:
    from gn_det.modeling.with_gn import builder_of_backbone

    model = cfg.MODEL
    builder = builder_of_backbone(cfg)
    key = "BACKBONE.NAME" if builder == model.BACKBONE.NAME else "GN.BACKBONE"
    if builder.startswith("build_timm_") != bool(model.TIMM.NAME):
        yield (
            f"MODEL.{key} is {builder}, and MODEL.TIMM.NAME "
            f"{model.TIMM.NAME!r}; build_timm_fpn_backbone and its like go with a model of timm"
        )
    has_res5_head = model.META_ARCHITECTURE.endswith("RCNN") and (
        model.ROI_HEADS.NAME == "Res5ROIHeads"
    )
    if model.TIMM.NAME and not has_res5_head:
        yield _of_resnets_alone(model.RESNETS)


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


def _hand_over(cfg: CfgNode) -> Iterator[str]:
    model = cfg.MODEL
    hand_over = model.GN.HAND_OVER_STEPS
    yield ends_before("MODEL.GN.HAND_OVER_STEPS", hand_over, "SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER)
    for key, on in (
        ("GN.RECOMPUTE", model.GN.RECOMPUTE),
        ("GN.WEIGHT_STANDARDIZATION", model.GN.WEIGHT_STANDARDIZATION),
        ("BACKBONE.COMPILE", model.BACKBONE.COMPILE),
    ):
        if hand_over and on:
            yield f"MODEL.GN.HAND_OVER_STEPS {hand_over} and MODEL.{key} cannot be combined"


def ends_before(key: str, hand_over_steps: int, end: str, max_iter: int) -> str:
    if hand_over_steps <= max_iter:
        return ""
    return f"{key} {hand_over_steps} is above {end} {max_iter}: the norms would not become GN"


def _images(cfg: CfgNode) -> Iterator[str]:
    model = cfg.MODEL
    if len(model.PIXEL_MEAN) != len(model.PIXEL_STD):
        yield (
            f"MODEL.PIXEL_MEAN {model.PIXEL_MEAN} and MODEL.PIXEL_STD {model.PIXEL_STD} have "
            "different numbers of channels"
        )
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
    cropped = cfg.INPUT.CROP.ENABLED and model.MASK_ON and cfg.INPUT.MASK_FORMAT == "polygon"
    if cropped and importlib.util.find_spec("shapely") is None:
        yield (
            "INPUT.CROP.ENABLED cuts polygons, which needs the package shapely: install it, or set "
            "INPUT.MASK_FORMAT to bitmask"
        )


def _proposals(cfg: CfgNode) -> Iterator[str]:
    model = cfg.MODEL
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
    files = cfg.DATASETS.PROPOSAL_FILES_TRAIN or cfg.DATASETS.PROPOSAL_FILES_TEST
    if files and not model.LOAD_PROPOSALS:
        yield f"DATASETS.PROPOSAL_FILES_* {files} are read with MODEL.LOAD_PROPOSALS True alone"
    if model.META_ARCHITECTURE.endswith("RCNN"):
        features = model.RPN.IN_FEATURES
        for name in ("SIZES", "ASPECT_RATIOS"):
            anchors = model.ANCHOR_GENERATOR[name]
            if len(anchors) not in (1, len(features)):
                yield (
                    f"MODEL.ANCHOR_GENERATOR.{name} has {len(anchors)} lists, and "
                    f"MODEL.RPN.IN_FEATURES {len(features)} levels: give one list, or one for each"
                )
    for part in ("RPN", "ROI_HEADS"):
        thresholds, labels = model[part].IOU_THRESHOLDS, model[part].IOU_LABELS
        if len(labels) != len(thresholds) + 1 or increasing(thresholds):
            yield (
                f"MODEL.{part}.IOU_THRESHOLDS {thresholds} and IOU_LABELS {labels}: thresholds in "
                "increasing order, and one label more than these"
            )


def _loader(cfg: CfgNode) -> Iterator[str]:
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler == "RandomSubsetTrainingSampler" and "RANDOM_SUBSET_RATIO" not in cfg.DATALOADER:
        yield (
            f"DATALOADER.SAMPLER_TRAIN {sampler} reads DATALOADER.RANDOM_SUBSET_RATIO, which the "
            "configs of this Detectron2 do not have; take another"
        )


def _solver(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    reference = solver.REFERENCE_WORLD_SIZE
    if reference and solver.IMS_PER_BATCH % reference:
        yield (
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is no multiple of "
            f"SOLVER.REFERENCE_WORLD_SIZE {reference}"
        )
    if solver.RESCALE_INTERVAL and solver.WARMUP_ITERS >= solver.MAX_ITER:
        yield (
            f"SOLVER.RESCALE_INTERVAL needs a warm-up that ends: SOLVER.WARMUP_ITERS "
            f"{solver.WARMUP_ITERS} is not below SOLVER.MAX_ITER {solver.MAX_ITER}"
        )
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


def refuse(wrong: Iterable[str]) -> None:
    """Raise an InputError with everything that is wrong, where something is."""
    found = [each for each in wrong if each]
    if found:
        raise InputError("; ".join(found))
