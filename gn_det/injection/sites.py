"""Where a Detectron2 model holds the convolutions that inject normalises.

A site names a part of a detector; its convolutions are found by the Detectron2 class that owns
them, so subclasses and any nesting are covered.
"""

from __future__ import annotations

from collections.abc import Iterator

from detectron2.modeling import FPN, ResNet
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, MaskRCNNConvUpsampleHead
from torch import nn

__all__ = ["SITES", "site_convolutions"]


def _resnet_convolutions(resnet: ResNet) -> list[nn.Module]:
    # conv2_offset predicts the sampling points of a deformable convolution: never normalised.
    return [
        module
        for name, module in resnet.named_modules()
        if hasattr(module, "norm") and not name.endswith("conv2_offset")
    ]


SITES = {
    "backbone": (ResNet, _resnet_convolutions),
    "fpn": (FPN, lambda fpn: fpn.lateral_convs + fpn.output_convs),
    "box_head": (FastRCNNConvFCHead, lambda head: head.conv_norm_relus),
    "mask_head": (MaskRCNNConvUpsampleHead, lambda head: head.conv_norm_relus),
}


def site_convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (site, convolution) for every convolution at one of SITES, in module order."""
    for module in model.modules():
        for site, (owner, convolutions) in SITES.items():
            if isinstance(module, owner):
                for conv in convolutions(module):
                    yield site, conv
