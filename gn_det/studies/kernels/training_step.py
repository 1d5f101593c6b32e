"""A Mask R-CNN training step with our layer against the same with nn.GroupNorm, interleaved."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import torch
from torch import nn

from gn_det.engine.stopwatch import seconds_of_step

__all__ = ["made_up_batch", "training_step_row"]


def training_step_row(steps: int = 15) -> dict[str, Any]:
    """Seconds of a training step on the CPU, fused and with nn.GroupNorm, and their median ratio.

    The small ResNet-18-FPN Mask R-CNN on 2 made-up images of 128×128, from the same weights and
    seeds. Each step runs twice with both layers, in the order A B B A, so that a drift of the
    machine's speed cancels; the first step is not counted.
    """
    from detectron2.modeling import build_model

    from gn_det.config import get_config
    from gn_det.injection import unfuse

    cfg = get_config("small/mask_rcnn_R_18_FPN_gn.yaml")
    cfg.MODEL.DEVICE = "cpu"
    torch.manual_seed(0)
    ours = build_model(cfg).train()
    theirs = unfuse(copy.deepcopy(ours))
    batch = made_up_batch()

    times: list[tuple[float, float]] = []
    for seed in range(steps + 1):
        first = [_step(model, batch, seed) for model in (ours, theirs)]
        second = [_step(model, batch, seed) for model in (theirs, ours)]
        times.append((first[0] + second[1], first[1] + second[0]))
    times = times[1:]
    return {
        "model": "R-18-FPN Mask R-CNN, 2×128×128, CPU",
        "steps": steps,
        "FusedGroupNorm s": statistics.median(t for t, _ in times) / 2,
        "nn.GroupNorm s": statistics.median(t for _, t in times) / 2,
        "ratio": statistics.median(ours / theirs for ours, theirs in times),
    }


def made_up_batch(
    num_images: int = 2, image_size: tuple[int, int] = (128, 128)
) -> list[dict[str, Any]]:
    """Images of (height, width) with three objects each."""
    from detectron2.structures import BitMasks, Boxes, Instances

    batch = []
    height, width = image_size
    for _ in range(num_images):
        instances = Instances(image_size)
        corners = torch.randint(0, 80, (3, 2))
        boxes = torch.cat([corners, corners + 40], dim=1)
        boxes = boxes * torch.tensor([width, height, width, height]) // 128
        masks = torch.zeros(3, height, width, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
        instances.gt_boxes = Boxes(boxes.float())
        instances.gt_classes = torch.arange(3)
        instances.gt_masks = BitMasks(masks)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def _step(model: nn.Module, batch: list[dict[str, Any]], seed: int) -> float:
    """Seconds of a step; the seed draws the sampled proposals."""
    torch.manual_seed(seed)
    return seconds_of_step(model, batch)
