"""GN weights of a timm backbone, fitted to those with BN on the training pictures."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import Tensor, nn

from gn_det.data.train_loader import build_train_loader
from gn_det.errors import InputError
from gn_det.injection import convert_bn, distill, inject
from gn_det.modeling.with_gn import groups_from_config
from gn_det.utils import check_regular_file, make_folder, whole_file, write_atomically

__all__ = ["SETTINGS", "STAGES", "prepare_weights", "seed_of", "settings_of", "source_of"]

STAGES = ("calibrated", "distilled")
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


def settings_of(cfg: CfgNode, steps: int, num_images: int = 16) -> dict[str, Any]:
    """What the files depend on that :func:`prepare_weights` writes with these arguments."""
    weights, _ = source_of(cfg.MODEL.TIMM.WEIGHTS)
    digest = hashlib.sha256()
    if weights != "timm":
        check_regular_file(weights, "weights")
        digest.update(Path(weights).read_bytes())
    pictures = [entry["file_name"] for entry in _training_pictures(cfg)]
    return {
        "model": cfg.MODEL.TIMM.NAME,
        "weights": f"{Path(weights).name} {digest.hexdigest()[:12]}",
        **groups_from_config(cfg),
        "weight_standardization": cfg.MODEL.GN.WEIGHT_STANDARDIZATION,
        "pictures": hashlib.sha256("\n".join(sorted(pictures)).encode()).hexdigest()[:12],
        "input": hashlib.sha256(cfg.INPUT.dump().encode()).hexdigest()[:12],
        "ims_per_batch": cfg.SOLVER.IMS_PER_BATCH,
        "num_images": num_images,
        "steps": steps,
        "seed": cfg.SEED,
    }


def seed_of(folder: Path) -> int:
    """With which the weights in a folder were begun, for a SEED that is drawn."""
    return json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["seed"]


def _training_pictures(cfg: CfgNode) -> list[dict[str, Any]]:
    return [entry for name in cfg.DATASETS.TRAIN for entry in DatasetCatalog.get(name)]


def prepare_weights(cfg: CfgNode, folder: Path, steps: int, num_images: int = 16) -> None:
    """Write GN weights of a config's backbone, as files for MODEL.TIMM.WEIGHTS.

    ``calibrated.pth`` has γ and β fitted to the outputs of BN, ``distilled.pth`` also the features
    of the backbone with BN learnt, and ``errors.txt`` has the error of each level. All come from
    the training pictures without their labels. Files of the same settings stay, and an interrupted
    distillation goes on.

    Args:
        cfg: with a timm backbone, MODEL.TIMM.WEIGHTS, whose ending of a stage is left out, the
            groups of MODEL.GN, the training set and a SEED that is not negative.
        folder: to write to, created.
        steps: of the distillation, of SOLVER.IMS_PER_BATCH pictures each.
        num_images: that γ and β are fitted on, default 16.

    Raises:
        InputError: the folder has weights of other settings; or see :func:`gn_det.convert_bn` and
            :func:`gn_det.distill`.
    """
    settings = settings_of(cfg, steps, num_images)
    if (folder / SETTINGS).exists():
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        others = {key: value for key, value in settings.items() if found.get(key) != value}
        if others:
            there = {key: found.get(key) for key in others}
            raise InputError(
                f"{folder} has weights of other settings: {there} there, and {others} now; remove "
                "it, or name another folder"
            )
    if all((folder / f"{stage}.pth").exists() for stage in STAGES):
        return
    make_folder(folder)
    write_atomically(folder / SETTINGS, json.dumps(settings, indent=2) + "\n")
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = ""  # those of a detector would take the place of MODEL.TIMM.WEIGHTS
    cfg.MODEL.META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE.removeprefix("GN")
    cfg.MODEL.TIMM.WEIGHTS, _ = source_of(cfg.MODEL.TIMM.WEIGHTS)
    cfg.MODEL.TIMM.NORM = "FrozenBN"
    log = logging.getLogger(__name__)
    torch.manual_seed(cfg.SEED)
    model = build_model(cfg).eval()
    teacher = getattr(model.backbone, "bottom_up", model.backbone)
    batches = _Pictures(cfg, model)
    number = -(-min(len(_training_pictures(cfg)), num_images) // cfg.SOLVER.IMS_PER_BATCH)
    student = copy.deepcopy(teacher)
    log.info(f"fitting γ, β of GN on {number * cfg.SOLVER.IMS_PER_BATCH} training pictures")
    convert_bn(student, [*islice(batches, number)], **groups_from_config(cfg))
    _write(student, teacher, folder / "calibrated.pth")
    if cfg.MODEL.GN.WEIGHT_STANDARDIZATION:
        inject(student, weight_standardization=True)
    checkpoint = folder / "distillation.checkpoint"
    done = distill(student, teacher, batches, steps=steps, checkpoint=checkpoint)
    log.info(f"errors of the features\n{done}")
    write_atomically(folder / "errors.txt", f"{done}\n")
    _write(student, teacher, folder / "distilled.pth")
    checkpoint.unlink()


def _write(student: nn.Module, teacher: nn.Module, file: Path) -> None:
    """As timm's file: with the statistics of BN, which the model is built with before GN is."""
    with whole_file(file) as stream:
        torch.save({**teacher.body.state_dict(), **student.body.state_dict()}, stream)


class _Pictures:
    """Batches of training pictures as the backbone takes them, the same whenever one begins."""

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        self.cfg = cfg
        self.model = model

    def __iter__(self) -> Iterator[Tensor]:
        with closing(build_train_loader(self.cfg)) as loader:
            for inputs in loader:
                yield self.model.preprocess_image(inputs).tensor
