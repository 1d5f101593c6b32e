"""Fuse: let norms take in the additions and ReLUs behind them. Unfuse: undo that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.sites import type_name
from gn_det.layers import FusedGroupNorm, FusedReLU
from gn_det.layers.conv_norm import ConvNorm1d, ConvNorm2d, ConvTransposeNorm2d
from gn_det.layers.detectron2 import loaded_blocks
from gn_det.layers.recomputation import keep_in
from gn_det.layers.weight_standardization import ConvWSNorm1d, ConvWSNorm2d
from gn_det.ops.form import Form

if TYPE_CHECKING:
    from gn_det.layers.detectron2.blocks import Fused

__all__ = ["fuse", "fused_forms", "revert", "unfuse"]


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
    for kind, fused in _fused_classes().items():
        for module in model.modules():
            if type(module) is kind and fused.fits(module):
                module.__class__ = fused
                for name in fused.relu_norms:
                    module.get_submodule(name).activation = "relu"
    for norm, relu in norms_right_before_relus(model):
        norm.activation = "relu"
        relu.__class__ = FusedReLU
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Undo fuse and recompute, and make FusedGroupNorms plain nn.GroupNorms, in place.

    For export, and for comparisons with PyTorch's own. Parameters stay the same objects. Norms
    that were built with an activation, and towers that gained norms, stay what they are.

    Args:
        model: of any kind.

    Returns:
        model.

    Raises:
        InputError: it has nothing of gn_det's, or a fused module was made another class since.
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no FusedGroupNorm: nothing to unfuse")
    unfused = {fused: kind for kind, fused in _fused_classes().items()}
    for name, module in model.named_modules():
        if isinstance(module, tuple(unfused)) and type(module) not in unfused:
            raise InputError(
                f"{name} is a {type(module).__name__} since fuse; undo that (parametrizations, "
                "FSDP) before unfuse"
            )
    for norm in norms_of_fused_relus(model):
        norm.activation = None
    for module in model.modules():
        keep_in(module)
        if isinstance(module, FusedReLU):
            module.__class__ = nn.ReLU
        elif type(module) in unfused:
            for name in module.relu_norms:
                module.get_submodule(name).activation = None
            module.__class__ = unfused[type(module)]
    for module in model.modules():
        if type(module) is FusedGroupNorm and module.activation is None:
            del module.activation
            module.__class__ = nn.GroupNorm
    return model


revert = unfuse  # the name that it had first


def fused_forms(model: nn.Module) -> dict[nn.Module, Form]:
    """What each GroupNorm of a model computes in one call."""
    forms: dict[nn.Module, Form] = {}
    fused = set(_fused_classes().values())
    for module in model.modules():  # blocks before their parts
        if type(module) in fused:
            for name, form in module.forms().items():
                forms.setdefault(module.get_submodule(name), form)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            if getattr(module, "activation", None) is not None:
                forms[module] = Form(relu=True)
            forms.setdefault(module, Form())
    return forms


def _fused_classes() -> dict[type[nn.Module], type[Fused]]:
    """Detectron2's classes that have a fused one, and that."""
    blocks = loaded_blocks()
    return blocks.FUSED if blocks else {}


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
    blocks = loaded_blocks()
    ends = type(layer) in _CONV_NORMS or (blocks is not None and blocks.is_fused_conv(layer))
    return layer.norm if ends and type(layer.norm) is FusedGroupNorm else None
