"""Fuse: let norms take in the additions and ReLUs behind them; revert: undo it."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from gn_det.errors import InputError
from gn_det.injection.sites import type_name
from gn_det.layers import FusedGroupNorm, FusedReLU

__all__ = ["fuse", "fused_forms", "revert"]

_BLOCKS = "gn_det.layers.detectron2_blocks"
_RESNET = "detectron2.modeling.backbone.resnet"

# By exact class, since a subclass may compute something else. Convolutions first: the others need
# theirs to be fused ones.
_FUSED = {
    "detectron2.layers.wrappers.Conv2d": "FusedConv2d",
    f"{_RESNET}.BasicBlock": "FusedBasicBlock",
    f"{_RESNET}.BottleneckBlock": "FusedBottleneckBlock",
    f"{_RESNET}.DeformBottleneckBlock": "FusedDeformBottleneckBlock",
    f"{_RESNET}.BasicStem": "FusedBasicStem",
    "detectron2.modeling.backbone.fpn.FPN": "FusedFPN",
}

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


def fuse(model: nn.Module) -> nn.Module:
    """Let FusedGroupNorms compute the additions and ReLUs behind them, in place.

    Detectron2's convolutions with norm and ReLU, residual blocks (basic, bottleneck, deformable),
    the stem, FPN's lateral convolutions, and norm and ReLU one behind the other in nn.Sequentials
    and heads become classes that compute the same in fewer passes over memory; subclasses of them
    stay as they are. Modules, their names, parameters, hooks and isinstance are kept. A block
    whose parts have hooks runs unfused; a norm whose repr has ``activation=relu`` returns what the
    ReLU behind it did.

    Args:
        model: with FusedGroupNorms, see :func:`gn_det.inject`.

    Returns:
        model.

    Raises:
        InputError: it has no FusedGroupNorm, so nothing could be fused.
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} has no FusedGroupNorm to fuse anything into; call inject first"
        )
    for name, fused_name in _FUSED.items():
        for module in [*model.modules()]:
            if type_name(type(module)) == name and _FITS[fused_name](module):
                module.__class__ = getattr(importlib.import_module(_BLOCKS), fused_name)
                if fused_name == "FusedDeformBottleneckBlock":
                    module.conv2.norm.activation = "relu"
    for norm, relu in _norms_before_relus(model):
        norm.activation = "relu"
        relu.__class__ = FusedReLU
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse`, and make FusedGroupNorms plain nn.GroupNorms, in place.

    For export, and for comparisons with PyTorch's own. Parameters stay the same objects. Norms
    that were built with an activation, and towers that gained norms, stay what they are.

    Args:
        model: of any kind.

    Returns:
        model.

    Raises:
        InputError: it has nothing of gn_det's.
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no FusedGroupNorm: nothing to revert")
    for norm, _ in _pairs(model, FusedReLU):
        norm.activation = None
    for module in [*model.modules()]:
        if isinstance(module, FusedReLU):
            module.__class__ = nn.ReLU
        elif type_name(type(module)) in _REVERTED:
            if type(module).__name__ == "FusedDeformBottleneckBlock":
                module.conv2.norm.activation = None
            base = next(kind for kind in type(module).__mro__ if type_name(kind) in _FUSED)
            module.__class__ = base
    for module in model.modules():
        if type(module) is FusedGroupNorm and module.activation is None:
            del module.activation
            module.__class__ = nn.GroupNorm
    return model


_REVERTED = {f"{_BLOCKS}.{name}" for name in _FUSED.values()}


def fused_forms(model: nn.Module) -> dict[nn.Module, str]:
    """What each GroupNorm of a model computes in one call, such as "GN+add+ReLU"."""
    forms = {}
    for module in model.modules():  # blocks before their parts
        if type_name(type(module)) in _REVERTED:
            for name, form in module.forms().items():
                forms.setdefault(module.get_submodule(name), form)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            if getattr(module, "activation", None) is not None:
                forms[module] = "GN+ReLU"
            forms.setdefault(module, "GN")
    return forms


def _is_relu(activation: object) -> bool:
    return type(activation) is nn.ReLU or activation in (F.relu, F.relu_, torch.relu)


def _has_plain_norm(conv: nn.Module) -> bool:
    """Whether a convolution ends in a FusedGroupNorm that computes nothing else yet."""
    norm = getattr(conv, "norm", None)
    return type(norm) is FusedGroupNorm and norm.activation is None


def _is_fused_conv(conv: nn.Module) -> bool:
    return type_name(type(conv)) == f"{_BLOCKS}.FusedConv2d" and conv.activation is None


def _all_fused(block: nn.Module) -> bool:
    convs = [block.conv1, block.conv2, block.shortcut, getattr(block, "conv3", None)]
    return all(_is_fused_conv(conv) for conv in convs if conv is not None)


def _deform_fits(block: nn.Module) -> bool:
    others = (conv for conv in (block.conv1, block.conv3, block.shortcut) if conv is not None)
    plain = _has_plain_norm(block.conv2) and block.conv2.activation is None
    return plain and all(map(_is_fused_conv, others))


_FITS = {
    "FusedConv2d": lambda conv: (
        _has_plain_norm(conv) and (conv.activation is None or _is_relu(conv.activation))
    ),
    "FusedBasicBlock": _all_fused,
    "FusedBottleneckBlock": _all_fused,
    "FusedDeformBottleneckBlock": _deform_fits,
    "FusedBasicStem": lambda stem: _is_fused_conv(stem.conv1),
    "FusedFPN": lambda fpn: all(map(_is_fused_conv, fpn.lateral_convs)),
}


def _norms_before_relus(model: nn.Module) -> Iterator[tuple[FusedGroupNorm, nn.ReLU]]:
    """Pairs of which the ReLU has no other module before it."""
    pairs = list(_pairs(model, nn.ReLU))
    uses = Counter(
        child for parent in model.modules() for child in parent._modules.values()
    )  # named_children has each once
    for norm, relu in pairs:
        if norm.activation is None and uses[relu] == 1 and uses[norm] == 1:
            yield norm, relu


def _pairs(model: nn.Module, relu_type: type[nn.ReLU]) -> Iterator[tuple[FusedGroupNorm, nn.ReLU]]:
    """FusedGroupNorms that a module of exactly this type comes behind."""
    for parent in model.modules():
        if _calls_in_order(type(parent)):
            layers = [layer for layer in parent.children() if layer is not None]
            for layer, following in pairwise(layers):
                norm = _last_norm(layer)
                if norm is not None and type(following) is relu_type:
                    yield norm, following


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
    """The FusedGroupNorm that a layer is or ends in."""
    if type(layer) is FusedGroupNorm:
        return layer
    norm = getattr(layer, "norm", None)
    ends = type(norm) is FusedGroupNorm and getattr(layer, "activation", None) is None
    return norm if ends else None
