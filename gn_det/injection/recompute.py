"""Recompute: save memory by computing norms and ReLUs again in the backward pass."""

from __future__ import annotations

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.fuse import fused_forms, is_fusable
from gn_det.layers import FusedGroupNorm
from gn_det.layers.recomputation import recompute_in, recomputes_in
from gn_det.ops.form import Form

__all__ = ["recompute", "recomputed_norms"]


def recompute(model: nn.Module) -> nn.Module:
    """Save memory by recomputing norms and ReLUs in the backward pass.

    A fused model then needs about the activation memory of frozen BN. It recomputes all norms and
    ReLUs, and the 1x1 convolutions that end a residual block or form its shortcut. A bottleneck
    block keeps the outputs of its two narrow convolutions and its result. FPN, stem and heads keep
    the outputs of their convolutions.

    Gradients do not change; on the CPU they are bitwise equal. Evaluation, weights, their names and
    torch.compile are not affected. Recomputation is active while this model runs as a whole: if it
    is a part of a larger model, the outputs that it hands on are kept. It does not touch regions
    inside torch.utils.checkpoint.

    Args:
        model: a fused model, see :func:`gn_det.fuse`. It is modified in place. Call this last,
            before DistributedDataParallel.

    Returns:
        model.

    Raises:
        InputError: the model has no FusedGroupNorm, or none is fused with what is behind it.

    Example::

        gn_det.fuse(gn_det.inject(model))
        gn_det.recompute(model)
    """
    if not any(isinstance(module, FusedGroupNorm) for module in model.modules()):
        raise InputError(
            f"{type(model).__name__} has no FusedGroupNorm to recompute; call inject and fuse first"
        )
    if all(form == Form() for form in fused_forms(model).values()):
        advice = "call fuse first" if is_fusable(model) else "inject at other sites"
        raise InputError(
            f"no norm of {type(model).__name__} is fused with a ReLU or addition behind it, and "
            f"without that recomputing saves nothing; {advice}"
        )
    recompute_in(model)
    return model


def recomputed_norms(model: nn.Module) -> set[nn.Module]:
    """The norms whose result is computed again in the backward pass: all but those of blocks."""
    inside = {
        part for module in model.modules() if recomputes_in(module) for part in module.modules()
    }
    forms = fused_forms(model)
    return {norm for norm, form in forms.items() if norm in inside and not (form.relu and form.add)}
