"""Fuse: let norms take in the additions and ReLUs behind them; recompute; revert: undo both."""

from __future__ import annotations

import importlib

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.fusible import (
    BLOCKS,
    FUSED,
    norms_of_fused_relus,
    norms_right_before_relus,
)
from gn_det.injection.sites import type_name
from gn_det.layers import FusedGroupNorm, FusedReLU
from gn_det.layers.recomputation import keep_in, recompute_in, recomputes_in

__all__ = ["fuse", "fused_forms", "recompute", "recomputed_norms", "revert"]

_DEFORM = "FusedDeformBottleneckBlock"  # its 3x3 convolution calls its norm itself


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
    for name, (fused, fits) in FUSED.items():
        for module in model.modules():
            if type_name(type(module)) == name and fits(module):
                module.__class__ = getattr(importlib.import_module(BLOCKS), fused)
                if fused == _DEFORM:
                    module.conv2.norm.activation = "relu"
    for norm, relu in norms_right_before_relus(model):
        norm.activation = "relu"
        relu.__class__ = FusedReLU
    return model


def recompute(model: nn.Module) -> nn.Module:
    """Train in less memory: compute again in the backward pass what is cheap to, in place.

    Norms and ReLUs are, everywhere in the model, and the 1x1 convolutions that end a residual block
    or stand in its shortcut. Of a bottleneck block are kept two narrow convolutions' outputs and
    its result, as many bytes as with frozen BN; of FPN, stem and heads the convolutions' outputs.
    Gradients are the same: on the CPU the same bits. Weights, their names, evaluation and what
    torch.compile compiles stay as they are.

    It acts while model runs as a whole: where it is a part of another, what leaves it is kept.
    What runs inside torch.utils.checkpoint is left to that.

    Args:
        model: fused, see :func:`gn_det.fuse`. Call this last, before DistributedDataParallel.

    Returns:
        model.

    Raises:
        InputError: there is no FusedGroupNorm, or none that is fused with what is behind it.
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} has no FusedGroupNorm to recompute; call inject and fuse first"
        )
    if all(form == "GN" for form in fused_forms(model).values()):
        raise InputError(
            f"no norm of {type(model).__name__} is fused with the ReLU or addition behind it, and "
            "without that recomputing saves nothing; call fuse first, or inject at more sites"
        )
    recompute_in(model)
    return model


def revert(model: nn.Module) -> nn.Module:
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
        raise InputError(f"{type(model).__name__} has no FusedGroupNorm: nothing to revert")
    for name, module in model.named_modules():
        if not _is_fused(module) and any(
            kind.__module__ == BLOCKS for kind in type(module).__mro__
        ):
            raise InputError(
                f"{name} is a {type(module).__name__} since fuse; undo that (parametrizations, "
                "FSDP) before revert"
            )
    for norm in norms_of_fused_relus(model):
        norm.activation = None
    for module in model.modules():
        keep_in(module)
        if isinstance(module, FusedReLU):
            module.__class__ = nn.ReLU
        elif _is_fused(module):
            if type(module).__name__ == _DEFORM:
                module.conv2.norm.activation = None
            kinds = type(module).__mro__
            module.__class__ = next(kind for kind in kinds if type_name(kind) in FUSED)
    for module in model.modules():
        if type(module) is FusedGroupNorm and module.activation is None:
            del module.activation
            module.__class__ = nn.GroupNorm
    return model


def fused_forms(model: nn.Module) -> dict[nn.Module, str]:
    """What each GroupNorm of a model computes in one call, such as "GN+add+ReLU"."""
    forms = {}
    for module in model.modules():  # blocks before their parts
        if _is_fused(module):
            for name, form in module.forms().items():
                forms.setdefault(module.get_submodule(name), form)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            if getattr(module, "activation", None) is not None:
                forms[module] = "GN+ReLU"
            forms.setdefault(module, "GN")
    return forms


def recomputed_norms(model: nn.Module) -> set[nn.Module]:
    """The norms whose result is computed again in the backward pass: all but those of blocks."""
    forms = fused_forms(model)
    inside = {
        part for module in model.modules() if recomputes_in(module) for part in module.modules()
    }
    return {norm for norm, form in forms.items() if norm in inside and "add+ReLU" not in form}


def _is_fused(module: nn.Module) -> bool:
    return type(module).__module__ == BLOCKS
