"""Fuse: let norms take in the additions and ReLUs behind them. Unfuse: undo that."""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.kinds import Layer, type_name
from gn_det.injection.rewrite import CONV_NORMS, Rewritten, plan
from gn_det.layers import FusedGroupNorm, FusedReLU
from gn_det.layers.detectron2 import loaded_blocks
from gn_det.layers.recomputation import stop_recomputing_in
from gn_det.ops.form import Form

if TYPE_CHECKING:
    from gn_det.layers.detectron2.blocks import Fused

__all__ = ["fuse", "fused_forms", "is_fusable", "revert", "unfuse", "why_not_fused"]

_log = logging.getLogger(__name__)


def fuse(model: nn.Module) -> nn.Module:
    """Let each FusedGroupNorm also compute the addition and the ReLU behind it.

    Results are the same with fewer passes over memory. What follows a norm is read from the forward
    of the module that calls both, whatever its class (with torch.fx, see
    :mod:`gn_det.injection.rewrite`), and from Detectron2's own blocks. A log line says how many
    norms are fused, and why others are not; so does :func:`gn_det.audit`.

    Modules get another class in place. Their names, parameters, hooks and isinstance relations
    stay. A block whose parts have hooks, or whose settings are changed later, runs its original
    forward. In some of Detectron2's heads and stems, a norm that has taken in a ReLU shows
    ``activation=relu`` in its repr and returns values after the ReLU.

    Args:
        model: any model with FusedGroupNorms, see :func:`gn_det.inject`. It is modified in place.

    Returns:
        model.

    Raises:
        InputError: the model has no FusedGroupNorm.

    Example::

        gn_det.inject(model)
        gn_det.fuse(model)
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} has no FusedGroupNorm to fuse anything into; call inject first"
        )
    before = [(module, type(module), vars(module).get("activation")) for module in model.modules()]
    try:
        _fuse_known(model)
        found = plan(model)
        for module, kind in found.classes.items():
            _become(module, kind)
    except BaseException:  # it stays as it was
        for module, kind, activation in before:
            _become(module, kind)
            if isinstance(module, FusedGroupNorm):
                module.activation = activation
        raise
    _report(model, found.reasons)
    return model


def _fuse_known(model: nn.Module) -> None:
    """What goes by class: Detectron2's blocks, and ReLUs behind norms in its sequences."""
    for kind, fused in _fused_classes().items():
        for module in model.modules():
            if type(module) is kind and fused.fits(module):
                _become(module, fused)
                _set_activation(module, fused.relu_norms, "relu")
    for norm, relu in norms_right_before_relus(model):
        norm.activation = "relu"
        _become(relu, FusedReLU)


def is_fusable(model: nn.Module) -> bool:
    """Whether :func:`fuse` would change anything."""
    known = _fused_classes()
    return (
        any(known[type(m)].fits(m) for m in model.modules() if type(m) in known)
        or any(True for _ in norms_right_before_relus(model))
        or any(not _is_rewritten(module) for module in plan(model).classes)
    )


def why_not_fused(model: nn.Module) -> dict[nn.Module, str]:
    """Why norms of a model compute nothing else, by norm, for those that :func:`fuse` would leave.

    Norms that fuse would take, or has taken, are not in it.
    """
    return plan(model).reasons


def _report(model: nn.Module, reasons: dict[nn.Module, str]) -> None:
    forms = Counter(map(str, fused_forms(model).values()))
    alone = forms.pop(str(Form()), 0)
    counted = ", ".join(f"{count} {form}" for form, count in forms.most_common())
    why = "; ".join(f"{count}: {why}" for why, count in Counter(reasons.values()).most_common())
    name = type(model).__name__
    if not forms:
        if why:  # else they compute more than GN, as those that are handed over
            warnings.warn(
                f"fuse: none of the {alone} norms of {name} is fused with what follows ({why})",
                stacklevel=3,
            )
    else:
        _log.info(f"{name}: fused {forms.total()} of {forms.total() + alone} norms: {counted}")
        if why:
            _log.info(f"{name}: {alone} norms not fused, {why}")


def unfuse(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse` and :func:`recompute`, and turn FusedGroupNorm into nn.GroupNorm.

    Use it for export, or to compare with PyTorch's own layer. It does not undo inject: the model
    keeps GN, with the same parameter objects. A FusedGroupNorm that was built with an activation,
    and a tower that gained norms, keep their class. ``revert`` is another name of this function.

    Args:
        model: any model with FusedGroupNorms. It is modified in place.

    Returns:
        model.

    Raises:
        InputError: the model has no FusedGroupNorm, or something (a parametrization, FSDP) has
            changed the class of a fused module since.

    Example::

        gn_det.fuse(gn_det.inject(model))
        gn_det.unfuse(model)
        assert type(model.backbone.bottom_up.stem.conv1.norm) is nn.GroupNorm
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(f"{type(model).__name__} has no FusedGroupNorm: nothing to unfuse")
    unfused = {fused: kind for kind, fused in _fused_classes().items()}
    module: Layer
    for name, module in model.named_modules():
        changed = isinstance(module, tuple(unfused)) and type(module) not in unfused
        if changed or (issubclass(type(module), Rewritten) and not _is_rewritten(module)):
            raise InputError(
                f"{name} is a {type(module).__name__} since fuse; undo that (parametrizations, "
                "FSDP) before unfuse"
            )
    for norm in norms_of_fused_relus(model):
        norm.activation = None
    for module in model.modules():
        stop_recomputing_in(module)
        if isinstance(module, FusedReLU):
            _become(module, nn.ReLU)
        elif _is_rewritten(module):
            _become(module, type(module).unfused_kind)
        elif type(module) in unfused:
            _set_activation(module, module.relu_norms, None)
            _become(module, unfused[type(module)])
    for module in model.modules():
        if type(module) is FusedGroupNorm and module.activation is None:
            del module.activation
            _become(module, nn.GroupNorm)
    return model


revert = unfuse  # the name that it had first


def fused_forms(model: nn.Module) -> dict[nn.Module, Form]:
    """What each GroupNorm of a model computes in one call."""
    forms: dict[nn.Module, Form] = {}
    fused = set(_fused_classes().values())
    module: Layer
    for module in model.modules():  # blocks before their parts
        if type(module) in fused or _is_rewritten(module):
            for name, form in module.forms().items():
                forms.setdefault(module.get_submodule(name), form)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            if getattr(module, "activation", None) is not None:
                forms[module] = Form(relu=True)
            forms.setdefault(module, Form())
    return forms


def _is_rewritten(module: nn.Module) -> bool:
    """Whether a module's class is one that rewriting has generated, and none derived from it."""
    return "unfused_kind" in vars(type(module))


def _become(module: nn.Module, kind: type) -> None:
    """Give a module another class, in place: whoever holds the module keeps it."""
    module.__class__ = kind


def _set_activation(module: Layer, norms: Iterable[str], activation: str | None) -> None:
    for name in norms:
        module.get_submodule(name).activation = activation


def _fused_classes() -> dict[type[nn.Module], type[Fused]]:
    """Detectron2's classes that have a fused one, and that."""
    blocks = loaded_blocks()
    return blocks.FUSED if blocks else {}


# Modules of Detectron2 that call their children one after the other.
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
    for layer, norm, relu in [*_pairs(model, nn.ReLU)]:
        if norm.activation is None and uses[layer] == uses[norm] == uses[relu] == 1:
            yield norm, relu


def norms_of_fused_relus(model: nn.Module) -> Iterator[FusedGroupNorm]:
    """Yields the norms that have taken in the ReLU behind them."""
    for _, norm, _ in _pairs(model, FusedReLU):
        yield norm


def _pairs(
    model: nn.Module, relu_type: type[nn.ReLU]
) -> Iterator[tuple[nn.Module, FusedGroupNorm, nn.ReLU]]:
    """Yields (layer, the norm that it ends in, ReLU of exactly this type right behind)."""
    for parent in model.modules():
        if _calls_in_order(type(parent)):
            layers = [layer for layer in parent._modules.values() if layer is not None]
            for layer, following in pairwise(layers):
                norm = _last_norm(layer)
                if norm is not None and type(following) is relu_type:
                    yield layer, norm, following


def _calls_in_order(kind: type[nn.Module]) -> bool:
    """Whether modules of a class call their children one after the other."""
    known = next((base for base in kind.__mro__ if type_name(base) in _IN_ORDER), kind)
    same = all(
        getattr(kind, name, None) is getattr(known, name, None) for name in ("forward", "layers")
    )
    return type_name(known) in _IN_ORDER and same


def _last_norm(layer: Layer) -> FusedGroupNorm | None:
    """The FusedGroupNorm that a layer is, or a convolution ends in."""
    if type(layer) is FusedGroupNorm:
        return layer
    blocks = loaded_blocks()
    ends = type(layer) in CONV_NORMS or (blocks is not None and blocks.is_fused_conv(layer))
    return layer.norm if ends and type(layer.norm) is FusedGroupNorm else None
