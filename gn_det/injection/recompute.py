"""Recompute: save memory by computing norms and ReLUs again in the backward pass."""

from __future__ import annotations

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.fuse import fused_forms
from gn_det.layers import FusedGroupNorm
from gn_det.layers.recomputation import recompute_in, recomputes_in
from gn_det.ops.form import Form

__all__ = ["recompute", "recomputed_norms"]


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
    if all(form == Form() for form in fused_forms(model).values()):
        raise InputError(
            f"no norm of {type(model).__name__} is fused with the ReLU or addition behind it, and "
            "without that recomputing saves nothing; call fuse first, or inject at more sites"
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
