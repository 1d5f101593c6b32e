"""GN weights of a timm backbone, fitted to those with BN on the training pictures."""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import Tensor, nn

from gn_det.files import check_regular_file, make_folder
from gn_det.modeling.timm_backbone.converted import write_converted
from gn_det.modeling.with_gn import inject_options_from_config
from gn_det.studies.conversion.pictures import TrainingPictures, held_out_pictures
from gn_det.studies.conversion.report import images_shown, write_report
from gn_det.studies.conversion.settings import keep_settings
from gn_det.studies.conversion.stages import (
    CHECKPOINT,
    Conversion,
    ToDistill,
    convert_in_stages,
)
from gn_det.text import markdown

__all__ = [
    "CALIBRATION_IMAGES",
    "SETTINGS",
    "STAGES",
    "convert_backbone",
    "settings_of",
    "source_of",
]

STAGES = ("calibrated", "distilled")
CALIBRATION_IMAGES = 16  # by default
SETTINGS = "settings.json"  # beside the weights: what they were made of and how


def source_of(weights: str) -> tuple[str, str]:
    """What ``name_calibrated.pth`` or ``name_distilled.pth`` is made from, and by which stage.

    Returns:
        ("name.pth", stage); other names as they are, and an empty stage.
    """
    path = Path(weights)
    for stage in STAGES:
        if path.stem.endswith(f"_{stage}"):
            return str(path.with_stem(path.stem.removesuffix(f"_{stage}"))), stage
    return weights, ""


def settings_of(cfg: CfgNode, steps: int, num_images: int = CALIBRATION_IMAGES) -> dict[str, Any]:
    """What the files depend on that :func:`convert_backbone` writes with these arguments."""
    weights, _ = source_of(cfg.MODEL.TIMM.WEIGHTS)
    digest = hashlib.sha256()
    if weights != "timm":
        check_regular_file(weights, "weights")
        digest.update(Path(weights).read_bytes())
    files = [entry["file_name"] for entry in _training_pictures(cfg)]
    pictures = [f"{file} {os.path.getsize(file)}" for file in files]
    return {
        "model": cfg.MODEL.TIMM.NAME,
        "weights": f"{Path(weights).name} {digest.hexdigest()[:12]}",
        **inject_options_from_config(cfg),
        "pictures": hashlib.sha256("\n".join(sorted(pictures)).encode()).hexdigest()[:12],
        "input": hashlib.sha256(cfg.INPUT.dump().encode()).hexdigest()[:12],
        "ims_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "num_images": num_images,
        "steps": steps,
        "seed": cfg.SEED,
    }


def _training_pictures(cfg: CfgNode) -> list[dict[str, Any]]:
    return [entry for name in cfg.DATASETS.TRAIN for entry in DatasetCatalog.get(name)]


def convert_backbone(
    cfg: CfgNode, folder: Path, steps: int, num_images: int = CALIBRATION_IMAGES
) -> None:
    """Write GN weights of a config's backbone, as files for MODEL.TIMM.WEIGHTS.

    ``calibrated.pth`` has γ and β fitted to the outputs of BN, ``distilled.pth`` also the features
    of the backbone with BN learnt. Both come from the training pictures without their labels.
    ``report.md`` has the error of each norm, and of each level on the held-out set, or on training
    pictures where there is none. Files of the same settings stay, and an interrupted distillation
    goes on.

    Args:
        cfg: with a timm backbone, MODEL.TIMM.WEIGHTS, whose ending of a stage is left out, the
            groups of MODEL.GN, the training set, perhaps a held-out set, and a SEED that is not
            negative.
        folder: to write to, created.
        steps: of the distillation, of SOLVER.IMS_PER_BATCH pictures each.
        num_images: that γ and β are fitted on, default 16.

    Raises:
        InputError: the folder has weights of other settings; or see :func:`gn_det.convert_bn` and
            :func:`gn_det.distill`.
    """
    settings = settings_of(cfg, steps, num_images)
    make_folder(folder)
    keep_settings(folder / SETTINGS, settings)
    if all((folder / f"{stage}.pth").exists() for stage in STAGES):
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return
    bn_cfg = cfg.clone()
    bn_cfg.MODEL.WEIGHTS = ""  # those of a detector would take the place of MODEL.TIMM.WEIGHTS
    bn_cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.removeprefix("GN")
    bn_cfg.MODEL.TIMM.WEIGHTS, _ = source_of(cfg.MODEL.TIMM.WEIGHTS)
    bn_cfg.MODEL.TIMM.NORM = "FrozenBN"
    torch.manual_seed(cfg.SEED)
    model = build_model(bn_cfg).eval()
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    statistics = copy.deepcopy(backbone.body.state_dict())
    total, batch = len(_training_pictures(cfg)), cfg.SOLVER.IMS_PER_BATCH
    number = -(-min(total, num_images) // batch)
    fitted = images_shown(number * batch, total)
    logging.getLogger(__name__).info(f"fitting γ, β of GN on {fitted}")

    def features(backbone: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
        return backbone(model.preprocess_image(inputs).tensor)

    def keep(backbone: nn.Module, conversion: Conversion) -> None:
        stage = "distilled" if conversion.losses else "calibrated"
        made_for = cfg.clone()
        if stage == "calibrated":
            made_for.MODEL.GN.WEIGHT_STANDARDIZATION = False
        # The model is built with BN, and its statistics, before it gets GN.
        state = {**statistics, **backbone.body.state_dict()}
        write_converted(folder / f"{stage}.pth", state, made_for)
        how = (
            f"γ, β were fitted on {fitted} (seed {cfg.SEED}) to the BN layers of "
            f"{markdown(bn_cfg.MODEL.TIMM.WEIGHTS)}: calibrated.pth. Then the backbone learnt the "
            f"features of that with BN, in {steps} {'step' if steps == 1 else 'steps'} of "
            f"{batch} training images: distilled.pth."
        )
        write_report(folder, cfg.MODEL.TIMM.NAME, how, conversion, "", settings)

    convert_in_stages(
        backbone,
        [*islice(TrainingPictures(cfg), number)],
        features,
        keep=keep,
        to_distill=ToDistill(
            TrainingPictures(cfg), held_out_pictures(cfg), features, steps,
            folder / CHECKPOINT,
        ),
        **inject_options_from_config(cfg),
    )  # fmt: skip
