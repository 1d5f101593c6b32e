"""What can be fused: Detectron2's classes with fused forms, and norms right before ReLUs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from gn_det.injection.sites import type_name
from gn_det.layers import FusedGroupNorm, FusedReLU
from gn_det.layers.conv_norm import ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d
from gn_det.layers.weight_standardization import ConvWSNorm1d, ConvWSNorm2d

__all__ = ["BLOCKS", "FUSED", "Fusion", "norms_of_fused_relus", "norms_right_before_relus"]


class Fusion(NamedTuple):
    """A class of Detectron2's that has a fused form.

    Attributes:
        fused: name of that in BLOCKS.
        fits: whether a module has the norms that it needs.
    """

    fused: str
    fits: Callable[[nn.Module], bool]


def _conv_fits(conv: nn.Module) -> bool:
    return _has_plain_norm(conv) and (conv.activation is None or _is_relu(conv.activation))


def _block_fits(block: nn.Module) -> bool:
    convs = [block.conv1, block.conv2, block.shortcut, getattr(block, "conv3", None)]
    return all(_is_fused_conv(conv) for conv in convs if conv is not None)


def _deform_fits(block: nn.Module) -> bool:
    convs = (conv for conv in (block.conv1, block.conv3, block.shortcut) if conv is not None)
    plain = _has_plain_norm(block.conv2) and block.conv2.activation is None
    return plain and all(map(_is_fused_conv, convs))


def _stem_fits(stem: nn.Module) -> bool:
    return _is_fused_conv(stem.conv1)


def _fpn_fits(fpn: nn.Module) -> bool:
    return all(map(_is_fused_conv, fpn.lateral_convs))


def _is_relu(activation: object) -> bool:
    return type(activation) is nn.ReLU or activation in (F.relu, F.relu_, torch.relu)


def _has_plain_norm(conv: nn.Module) -> bool:
    """Whether a convolution ends in a FusedGroupNorm that computes nothing else yet."""
    norm = getattr(conv, "norm", None)
    return type(norm) is FusedGroupNorm and norm.activation is None


def _is_fused_conv(conv: nn.Module) -> bool:
    return type_name(type(conv)) in _FUSED_CONVS and conv.activation is None


BLOCKS = "gn_det.layers.detectron2_blocks"
_FUSED_CONVS = (f"{BLOCKS}.FusedConv2d", f"{BLOCKS}.FusedConvWS2d")
_RESNET = "detectron2.modeling.backbone.resnet"

# By exact class, since a subclass may compute something else. Convolutions first: the others need
# theirs to be fused ones.
FUSED = {
    "detectron2.layers.wrappers.Conv2d": Fusion("FusedConv2d", _conv_fits),
    "gn_det.layers.detectron2_conv.ConvWS2d": Fusion("FusedConvWS2d", _conv_fits),
    f"{_RESNET}.BasicBlock": Fusion("FusedBasicBlock", _block_fits),
    f"{_RESNET}.BottleneckBlock": Fusion("FusedBottleneckBlock", _block_fits),
    f"{_RESNET}.DeformBottleneckBlock": Fusion("FusedDeformBottleneckBlock", _deform_fits),
    f"{_RESNET}.BasicStem": Fusion("FusedBasicStem", _stem_fits),
    "detectron2.modeling.backbone.fpn.FPN": Fusion("FusedFPN", _fpn_fits),
}

_CONV_NORMS = (ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d, ConvWSNorm1d, ConvWSNorm2d)

# Modules that call their children one after the other, besides nn.Sequential.
_HEADS = "detectron2.modeling.roi_heads"
_REGNET = "detectron2.modeling.backbone.regnet"
_IN_ORDER = {
    f"{_HEADS}.mask_head.MaskRCNNConvUpsampleHead",
    f"{_HEADS}.keypoint_head.KRCNNConvDeconvUpsampleHead",
    f"{_REGNET}.SimpleStem",
    f"{_REGNET}.ResStem",
    f"{_REGNET}.VanillaBlock",
    f"{_REGNET}.BasicTransform",
    f"{_REGNET}.BottleneckTransform",
}


def norms_right_before_relus(model: nn.Module) -> Iterator[tuple[FusedGroupNorm, nn.ReLU]]:
    """Yields (norm, ReLU) where both have this one place in the model."""
    # children() has a module once, however often a parent holds it.
    uses = Counter(child for parent in model.modules() for child in parent._modules.values())
    for layer, relu in [*_pairs(model, nn.ReLU)]:
        norm = _last_norm(layer)
        if norm.activation is None and uses[layer] == uses[norm] == uses[relu] == 1:
            yield norm, relu


def norms_of_fused_relus(model: nn.Module) -> Iterator[FusedGroupNorm]:
    """Yields the norms that have taken in the ReLU behind them."""
    for layer, _ in _pairs(model, FusedReLU):
        yield _last_norm(layer)


def _pairs(model: nn.Module, relu_type: type[nn.ReLU]) -> Iterator[tuple[nn.Module, nn.ReLU]]:
    """Yields (layer that ends in a norm, ReLU of exactly this type right behind)."""
    for parent in model.modules():
        if _calls_in_order(type(parent)):
            layers = [layer for layer in parent._modules.values() if layer is not None]
            for layer, following in pairwise(layers):
                if type(following) is relu_type and _last_norm(layer) is not None:
                    yield layer, following


def _calls_in_order(kind: type[nn.Module]) -> bool:
    """Whether modules of a class call their children one after the other."""
    if issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward:
        return True
    known = next((base for base in kind.__mro__ if type_name(base) in _IN_ORDER), kind)
    same = all(
        getattr(kind, name, None) is getattr(known, name, None) for name in ("forward", "layers")
    )
    return type_name(known) in _IN_ORDER and same


def _last_norm(layer: nn.Module) -> FusedGroupNorm | None:
    """The FusedGroupNorm that a layer is, or a convolution ends in."""
    if type(layer) is FusedGroupNorm:
        return layer
    ends = type(layer) in _CONV_NORMS or _is_fused_conv(layer)
    return layer.norm if ends and type(layer.norm) is FusedGroupNorm else None
