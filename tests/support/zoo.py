"""The models of Detectron2's zoo, small pictures for them, and what they compute on those."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import detectron2.modeling.backbone.resnet
import numpy as np
import pytest
import torch
import torchvision
from detectron2 import model_zoo
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn

CONFIGS = Path(model_zoo.__file__).parent / "configs"

# With every kind of block and head among them, for `make test`.
FAMILIES = [
    "COCO-Detection/fcos_R_50_FPN_1x.py",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Misc/mask_rcnn_R_50_FPN_1x_dconv_c3-c5.yaml",
]

# Not detectors that can be built here, with the reason.
LEFT_OUT = {
    "Misc/mmdet_mask_rcnn_R_50_FPN_1x.py": "its model is mmdetection's, which has to be installed",
    "Misc/torchvision_imagenet_R_50.py": "classifies images",
}


@functools.cache
def architectures() -> list[str]:
    """One config for each model of the zoo: those of FAMILIES, then the others by name."""
    seen, found = set(), []
    files = [
        path.relative_to(CONFIGS).as_posix()
        for path in sorted([*CONFIGS.glob("*/*.yaml"), *CONFIGS.glob("*/*.py")])
        if not path.name.startswith("Base-") and path.parent.name != "common"
    ]
    for name in [*FAMILIES, *files]:
        if name in LEFT_OUT:
            continue
        model = model_config(name)
        if isinstance(model, CfgNode):
            node = model.MODEL.clone()
            node.defrost()
            node.WEIGHTS = ""
            text = node.dump()
        else:
            text = re.sub("0x[0-9a-f]+", "", str(model))  # addresses of functions
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in seen:
            seen.add(digest)
            found.append(name)
    return found


def model_config(name: str) -> CfgNode | DictConfig:
    """The config of a model: a whole CfgNode, or the model of a LazyConfig."""
    if name.endswith(".py"):
        return LazyConfig.load(str(CONFIGS / name)).model
    cfg = get_cfg()
    cfg.merge_from_file(str(CONFIGS / name), allow_unsafe=True)
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 8
    cfg.TEST.DETECTIONS_PER_IMAGE = 4
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 8
    return cfg


def build(name: str) -> nn.Module:
    """A model of the zoo with random weights, for few proposals."""
    config = model_config(name)
    if isinstance(config, CfgNode):
        return build_model(config)
    if "vitdet" in name:  # a picture of 1024×1024 takes long
        config.backbone.square_pad = config.backbone.net.img_size = 128
        config.backbone.net.update(depth=2, window_block_indexes=[0])
    if "roi_heads" in config:
        config.roi_heads.batch_size_per_image = 8
        config.proposal_generator.post_nms_topk = (8, 8)
    return instantiate(config)


class DeformConv(nn.Module):
    """Detectron2's layer over torchvision's operator: its own is compiled, and for GPUs only."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: nn.Module | None = None,
        activation: Callable | None = None,
    ) -> None:
        super().__init__()
        self.geometry = (stride, padding, dilation)
        self.weight = nn.Parameter(
            torch.empty(out_channels, in_channels // groups, kernel_size, kernel_size)
        )
        self.bias, self.norm, self.activation = None, norm, activation
        self.out_channels = out_channels

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        x = torchvision.ops.deform_conv2d(
            x, offset, self.weight, self.bias, *self.geometry, mask=mask
        )
        return self.norm(x) if self.norm is not None else x


def stand_in_for_deform_conv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Detectron2 build its deformable blocks without its compiled extension."""
    for name in ("DeformConv", "ModulatedDeformConv"):
        monkeypatch.setattr(detectron2.modeling.backbone.resnet, name, DeformConv)


def pictures(*sizes: tuple[int, int]) -> list[dict[str, Any]]:
    """Inputs for any model of the zoo, an object in each; one picture by default."""
    inputs = []
    for height, width in sizes or [(64, 96)]:
        boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
        masks = torch.zeros(1, height, width, dtype=torch.bool)
        masks[:, 8:48, 8:40] = True
        points = torch.stack([torch.linspace(10, 38, 17), torch.linspace(10, 46, 17)], dim=1)
        keypoints = torch.cat([points, torch.full((17, 1), 2.0)], dim=1)[None]
        objects = Instances(
            (height, width),
            gt_boxes=Boxes(boxes),
            gt_classes=torch.zeros(1, dtype=torch.int64),
            gt_masks=BitMasks(masks),
            gt_keypoints=Keypoints(keypoints),
        )
        proposals = Instances(
            (height, width),
            proposal_boxes=Boxes(torch.cat([boxes + 2, boxes / 2])),
            objectness_logits=torch.ones(2),
        )
        generator = np.random.default_rng(height)
        image = generator.integers(0, 256, (3, height, width), dtype=np.uint8)
        inputs.append(
            {
                "image": torch.from_numpy(image),
                "instances": objects,
                "proposals": proposals,
                "sem_seg": torch.zeros(height, width, dtype=torch.int64),
                "height": height,
                "width": width,
            }
        )
    return inputs


def step(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Losses and gradients of a training step, by name; the same proposals are drawn each time."""
    torch.manual_seed(0)
    model.train().zero_grad()
    with EventStorage():
        losses = model(inputs)
        sum(losses.values()).backward()
    gradients = {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**{name: loss.detach() for name, loss in losses.items()}, **gradients}


def detect(model: nn.Module, inputs: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a model predicts, as tensors by name."""
    model.eval()
    outputs: dict[str, Tensor] = {}

    def collect(prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            outputs[prefix] = value
        elif isinstance(value, Boxes):
            outputs[prefix] = value.tensor
        elif isinstance(value, Instances):
            collect(prefix, value.get_fields())
        elif isinstance(value, dict):
            for key, item in value.items():
                collect(f"{prefix} {key}", item)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                collect(f"{prefix} {index}", item)

    with torch.no_grad():
        collect("", model(inputs))
    return outputs
