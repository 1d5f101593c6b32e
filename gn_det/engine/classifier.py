"""Training a Detectron2 ResNet as a classifier, as the backbone that a detector starts from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from gn_det.data.object_crops import ObjectCrops
from gn_det.errors import InputError
from gn_det.injection import fuse
from gn_det.layers import FusedGroupNorm

__all__ = ["NORMS", "accuracy", "build_classifier", "train_classifier"]

NORMS = {"BN": "BN", "GN": FusedGroupNorm}

# Of Detectron2's models that start from scratch, BGR.
PIXEL_MEAN = (103.53, 116.28, 123.675)
PIXEL_STD = (57.375, 57.12, 58.395)


def build_classifier(depth: int, norm: str, num_classes: int) -> ResNet:
    """Detectron2's ResNet with a linear classifier, its stride in the 3×3 convolutions.

    Args:
        depth: 18, 34, 50 or 101.
        norm: a key of NORMS.
        num_classes: outputs.
    """
    bottleneck = {"stride_in_1x1": False} if depth >= 50 else {}
    stages = ResNet.make_default_stages(depth, norm=NORMS[norm], **bottleneck)
    features = ["res5", "linear"]  # by the former Detectron2 knows how many stages to keep
    resnet = ResNet(BasicStem(norm=NORMS[norm]), stages, num_classes, out_features=features)
    return fuse(resnet) if norm == "GN" else resnet


def train_classifier(
    model: nn.Module,
    crops: ObjectCrops,
    *,
    epochs: int,
    batch_size: int = 32,
    lr: float = 0.1,
    seed: int = 0,
    num_workers: int = 0,
) -> None:
    """Train with SGD, weight decay on every parameter, a warm-up and a cosine schedule.

    The learning rate is the paper's for 32 images (Wu & He 2018, section 4.1), in proportion for
    others.

    Args:
        model: from normalised pictures to {"linear": scores}, changed in place.
        crops: what to learn.
        epochs: passes over them; each leaves out a last batch that is not full.
        batch_size: images a step.
        lr: for 32 images.
        seed: of the order.
        num_workers: loading processes.

    Raises:
        InputError: fewer crops than a batch has, or a loss that is not finite.
    """
    steps = len(crops) // batch_size
    if steps == 0:
        raise InputError(f"{len(crops)} objects do not make a batch of {batch_size}")
    lr = lr * batch_size / 32
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = WarmupParamScheduler(
        CosineParamScheduler(start_value=lr, end_value=0.0),
        warmup_factor=0.01,
        warmup_length=0.1,
    )
    loader = DataLoader(
        crops, batch_sampler=_epochs(len(crops), batch_size, epochs, seed), num_workers=num_workers
    )
    model.train()
    progress = tqdm(loader, total=steps * epochs, desc="classifier", unit="step")
    for step, (pictures, labels) in enumerate(progress):
        for group in optimizer.param_groups:
            group["lr"] = schedule(step / (steps * epochs))
        loss = F.cross_entropy(model(normalized(pictures))["linear"], labels)
        if not loss.isfinite():
            raise InputError(f"the loss is {loss.item()} at step {step}; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def accuracy(model: nn.Module, crops: ObjectCrops, batch_size: int = 100) -> float:
    """Part of crops whose class has the highest score, from 0 to 1."""
    model.eval()
    places = [(0, i) for i in range(len(crops))]
    batches = [places[i : i + batch_size] for i in range(0, len(places), batch_size)]
    right = 0
    for pictures, labels in DataLoader(crops, batch_sampler=batches):
        right += (model(normalized(pictures))["linear"].argmax(1) == labels).sum().item()
    return right / len(crops)


def normalized(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) BGR pictures with values from 0 to 255, as a detector normalises them."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (pictures - mean) / std


def _epochs(size: int, batch_size: int, epochs: int, seed: int) -> Iterator[list[tuple[int, int]]]:
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = torch.randperm(size, generator=generator).tolist()
        for start in range(0, size - batch_size + 1, batch_size):
            yield [(epoch, i) for i in order[start : start + batch_size]]
