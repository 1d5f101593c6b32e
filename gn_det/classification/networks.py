"""Classifiers with any norm: Detectron2's ResNets, as a detector's backbone, and VGG-16."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import CNNBlockBase, Conv2d, NaiveSyncBatchNorm, get_norm
from detectron2.modeling.backbone.resnet import (
    BasicBlock,
    BasicStem,
    BottleneckBlock,
    ResNet,
)
from detectron2.utils.events import get_event_storage, has_event_storage
from fvcore.nn.weight_init import c2_msra_fill
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.injection import fuse
from gn_det.layers import FusedGroupNorm, Groups

__all__ = [
    "NETWORKS",
    "NORMS",
    "PIXEL_MEAN",
    "PIXEL_STD",
    "Classifier",
    "build_classifier",
    "check_network",
    "stacked",
]

NETWORKS = ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "vgg16")
NORMS = ("none", "BN", "SyncBN", "LN", "IN", "GN")

# Of Detectron2's models that start from scratch, BGR.
PIXEL_MEAN = (103.53, 116.28, 123.675)
PIXEL_STD = (57.375, 57.12, 58.395)

Norm = str | Callable[[int], nn.Module]


class Classifier(nn.Module):
    """Images, normalized as a detector's, through a backbone to class scores.

    Called with samples, it returns Detectron2's dict of losses, and tells the event storage the
    percentage of them that have a wrong class, ``batch_error``.

    Args:
        backbone: its output "linear" are the scores.

    Attributes:
        backbone: what a detector may start from, but for its layer "linear".
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, samples: list[dict]) -> dict[str, Tensor]:
        """Cross entropy as ``loss_cls``, of :func:`gn_det.classification.crops.sample`s."""
        images, labels = stacked(samples)
        scores = self.scores(images)
        labels = labels.to(scores.device)
        if has_event_storage():
            error = (scores.argmax(1) != labels).float().mean().item()
            get_event_storage().put_scalar("batch_error", 100 * error)
        return {"loss_cls": F.cross_entropy(scores, labels)}

    def scores(self, images: Tensor) -> Tensor:
        """(N, classes) of (N, 3, H, W) BGR images with values from 0 to 255, on any device."""
        images = images.to(self.pixel_mean.device)
        return self.backbone((images - self.pixel_mean) / self.pixel_std)["linear"]


def stacked(samples: Sequence[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """(N, 3, H, W) images of samples, and their (N,) labels, on the CPU."""
    images = torch.stack([sample["image"] for sample in samples])
    return images, torch.tensor([sample["label"] for sample in samples])


def build_classifier(
    network: str,
    norm: str,
    num_classes: int,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
) -> Classifier:
    """A classifier with a norm behind every convolution.

    ResNets have their stride in the 3×3 convolutions, and γ = 0 in the last norm of each block (Wu
    & He 2018, section 4.1). "resnet10" is for images of 8 to 32 pixels: four stages of one basic
    block with 32 to 256 channels behind a 3×3 convolution, 8 pixels to one at the end.

    Args:
        network: one of NETWORKS.
        norm: one of NORMS; LN is GN with one group, IN with as many as channels. SyncBN takes the
            statistics of all processes, on the CPU, too.
        num_classes: scores.
        num_groups, channels_per_group: of GN, as in :func:`gn_det.inject`.

    Raises:
        InputError: an unknown network or norm, groups for a norm that has none, or both ways to
            say how many.
    """
    check_network(network, norm, num_groups, channels_per_group)
    layer = _norm_layer(norm, Groups(num_groups, channels_per_group))
    if network == "vgg16":
        backbone: nn.Module = VGG16(layer, num_classes)
    else:
        backbone = _resnet(int(network.removeprefix("resnet")), layer, num_classes)
    return fuse(Classifier(backbone)) if norm in ("LN", "IN", "GN") else Classifier(backbone)


def check_network(
    network: str, norm: str, num_groups: int | None, channels_per_group: int | None
) -> None:
    """Refuse what :func:`build_classifier` cannot build, with its arguments and its errors."""
    groups = Groups(num_groups, channels_per_group)
    if network not in NETWORKS or norm not in NORMS:
        raise InputError(
            f"network {network!r} and norm {norm!r}: the networks are {', '.join(NETWORKS)}, the "
            f"norms {', '.join(NORMS)}"
        )
    if norm != "GN" and not groups.is_default:
        raise InputError(
            f"num_groups {num_groups} and channels_per_group {channels_per_group} are of GN, and "
            f"the norm is {norm}"
        )


def _norm_layer(norm: str, groups: Groups) -> Norm:
    return {
        "none": "",
        "BN": "BN",
        "SyncBN": _SyncBN,
        "LN": partial(FusedGroupNorm, num_groups=1),
        "IN": lambda channels: FusedGroupNorm(channels, channels),
        "GN": lambda channels: FusedGroupNorm(channels, groups.of(channels)),
    }[norm]


class _SyncBN(NaiveSyncBatchNorm):
    """Detectron2's, with statistics in float32 in bfloat16, too; PyTorch's own refuses the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


def _resnet(depth: int, norm: Norm, num_classes: int) -> ResNet:
    if depth == 10:
        stem = SmallStem(norm)
        stages = [
            ResNet.make_stage(
                BasicBlock,
                1,
                in_channels=max(32, channels // 2),
                out_channels=channels,
                stride_per_block=[1 if channels == 32 else 2],
                norm=norm,
            )
            for channels in (32, 64, 128, 256)
        ]
    else:
        stem = BasicStem(norm=norm)
        bottleneck = {"stride_in_1x1": False} if depth >= 50 else {}
        stages = ResNet.make_default_stages(depth, norm=norm, **bottleneck)
    # Detectron2 drops the stages behind the last res of out_features.
    resnet = ResNet(stem, stages, num_classes, out_features=["res5", "linear"])
    for block in resnet.modules():
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            if last.norm is not None:
                nn.init.zeros_(last.norm.weight)
    return resnet


class SmallStem(CNNBlockBase):
    """A 3×3 convolution to 32 channels that keeps the size of its images."""

    def __init__(self, norm: Norm) -> None:
        super().__init__(3, 32, 1)
        self.conv1 = Conv2d(
            3, 32, 3, padding=1, bias=False, norm=get_norm(norm, 32), activation=F.relu
        )
        c2_msra_fill(self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


class VGG16(nn.Module):
    """VGG-16 (Simonyan & Zisserman 2015, configuration D) with a norm behind each convolution.

    The scores are linear in the mean of its features, since the three fully connected layers of the
    original need images of 224 pixels.

    Args:
        norm: what Detectron2's get_norm takes; convolutions without one have a bias.
        num_classes: scores.

    Attributes:
        features: conv1_1, norm1_1, relu1_1, ..., pool5, one after the other.
    """

    def __init__(self, norm: Norm, num_classes: int) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = 3
        for stage, (width, depth) in enumerate(
            ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)), start=1
        ):
            for place in (f"{stage}_{i + 1}" for i in range(depth)):
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=not norm)
                c2_msra_fill(conv)
                layers[f"conv{place}"], channels = conv, width
                if norm:
                    layers[f"norm{place}"] = get_norm(norm, width)
                layers[f"relu{place}"] = nn.ReLU()
            layers[f"pool{stage}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(layers)
        self.linear = nn.Linear(channels, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if min(x.shape[2:]) < 32:
            raise InputError(
                f"VGG-16 halves images five times and needs 32 pixels, not {tuple(x.shape[2:])}; "
                "give --size 32"
            )
        return {"linear": self.linear(self.features(x).mean((2, 3)))}
