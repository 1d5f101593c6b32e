"""What converting a detector from BN to GN takes: its GN config, and pictures to calibrate on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from gn_det.data.train_loader import build_train_loader
from gn_det.errors import InputError

__all__ = ["DetectorBatch", "calibration_batches", "config_with_gn", "run_on_boxes"]


class DetectorBatch(NamedTuple):
    """Pictures, and the boxes that RoI heads look at, whatever the model finds.

    Attributes:
        inputs: Detectron2's, one for each picture.
        proposals: for box heads; None for models without RoI heads.
        objects: the true boxes and classes, for mask and keypoint heads.
    """

    inputs: list[dict[str, Any]]
    proposals: list[Instances] | None
    objects: list[tuple[Boxes, Tensor]]


def config_with_gn(cfg: CfgNode, sites: list[str]) -> CfgNode:
    """The config whose model has GN at these sites, and everything else as in cfg.

    MODEL.META_ARCHITECTURE becomes gn_det's form of it, with the sites added to MODEL.GN.SITES; GN
    that the model has already stays.

    Args:
        cfg: of a model with BN at the sites; not changed.
        sites: keys of gn_det.injection.sites.SITES.

    Raises:
        InputError: gn_det has no form of that meta-architecture, or the config asks for Weight
            Standardization, under which the convolutions would compute something else.
    """
    if cfg.MODEL.GN.WEIGHT_STANDARDIZATION:
        raise InputError(
            "MODEL.GN.WEIGHT_STANDARDIZATION would change what the convolutions before BN compute; "
            "set it to False"
        )
    cfg = cfg.clone()
    cfg.defrost()
    name = cfg.MODEL.META_ARCHITECTURE
    there = []
    if name.startswith("GN"):
        there = [site for site in cfg.MODEL.GN.SITES if site not in sites]
    elif f"GN{name}" in META_ARCH_REGISTRY:
        cfg.MODEL.META_ARCHITECTURE = f"GN{name}"
    else:
        raise InputError(
            f"there is no GN form of MODEL.META_ARCHITECTURE {name} that a config could name; call "
            "gn_det.injection.convert_bn in your program"
        )
    cfg.MODEL.GN.SITES = [*there, *sites]
    return cfg


def calibration_batches(cfg: CfgNode, model: nn.Module, num_images: int) -> list[DetectorBatch]:
    """The first pictures of a training, as its mapper gives them, by SEED alone.

    Args:
        cfg: with a SEED that is not negative.
        model: with BN, in eval mode; box heads are going to look at its proposals.
        num_images: pictures in all, SOLVER.IMS_PER_BATCH at a time.
    """
    batches = []
    with closing(build_train_loader(cfg)) as loader:
        for inputs in islice(loader, -(-num_images // cfg.SOLVER.IMS_PER_BATCH)):
            inputs = inputs[: num_images - sum(len(batch.inputs) for batch in batches)]
            objects = [
                (x["instances"].gt_boxes, x["instances"].gt_classes)
                for x in inputs
                if "instances" in x
            ]
            batches.append(DetectorBatch(inputs, _proposals(model, inputs), objects))
    return batches


@torch.no_grad()
def _proposals(model: nn.Module, inputs: list[dict[str, Any]]) -> list[Instances] | None:
    if not hasattr(model, "roi_heads"):
        return None
    if model.proposal_generator is None:
        return [x["proposals"].to(model.device) for x in inputs]
    images = model.preprocess_image(inputs)
    proposals, _ = model.proposal_generator(images, model.backbone(images.tensor))
    return proposals


def run_on_boxes(model: nn.Module, batch: DetectorBatch) -> None:
    """Run every part of a detector in eval mode, its RoI heads on the boxes of the batch.

    Later stages of a cascade go on from the boxes of the stage before, one for each proposal.
    """
    if batch.proposals is None:
        model(batch.inputs)
        return
    images = model.preprocess_image(batch.inputs)
    features = model.backbone(images.tensor)
    if model.proposal_generator is not None:
        model.proposal_generator(images, features)
    if hasattr(model, "sem_seg_head"):
        model.sem_seg_head(features)
    with _box_head_alone(model.roi_heads):
        model.roi_heads(images, features, batch.proposals)
    objects = [
        Instances(size, pred_boxes=boxes, pred_classes=classes).to(model.device)
        for size, (boxes, classes) in zip(images.image_sizes, batch.objects, strict=True)
    ]
    model.roi_heads.forward_with_given_boxes(features, objects)


@contextmanager
def _box_head_alone(roi_heads: nn.Module) -> Iterator[None]:
    """Without the heads that go on from the boxes that the model found."""
    heads = [name for name in ("mask_on", "keypoint_on") if getattr(roi_heads, name, False)]
    try:
        for name in heads:
            setattr(roi_heads, name, False)
        yield
    finally:
        for name in heads:
            setattr(roi_heads, name, True)
