"""A model of mmengine's registry that is another one with GN."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS
from torch import nn

from gn_det import injection
from gn_det.errors import InputError
from gn_det.layers import FusedGroupNorm
from gn_det.mmcv_plugin.exact_boxes import use_exact_boxes

__all__ = ["inject_gn"]


def inject_gn(
    *,
    model: str | type | dict[str, Any],
    sites: str | Sequence[str] = "default",
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    min_channels_per_group: int = 1,
    weight_standardization: bool = False,
    recompute: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Build a registered model, inject GN, and fuse it. MODELS has this function as InjectGN.

    The model that is built is of its own class, with its own names. That happens where mmengine and
    ``init_detector`` build a model, so before there is an optimizer, an average (EMAHook) or a
    DistributedDataParallel, and before weights are loaded.

    Args:
        model: the type of the model, whose other keys stay beside it (so a config that inherits
            from another only adds this one and ``type="InjectGN"``); or its whole config.
        sites: see :func:`gn_det.inject`; or "GN", for the GN layers that the config and the
            defaults of its parts name, and no others.
        num_groups, channels_per_group, min_channels_per_group, weight_standardization: see
            :func:`gn_det.inject`. Layers that sites "GN" means keep their own.
        recompute: whether to call :func:`gn_det.recompute` as well.
        arguments: of the model.

    Returns:
        The model.

    Raises:
        InputError: as :func:`gn_det.inject`, or options of it beside sites "GN".
    """
    options = {
        "num_groups": num_groups,
        "channels_per_group": channels_per_group,
        "min_channels_per_group": min_channels_per_group,
        "weight_standardization": weight_standardization,
    }
    defaults = inspect.getfullargspec(inject_gn).kwonlydefaults or {}
    given = {name: value for name, value in options.items() if value != defaults[name]}
    if sites == "GN" and given:
        raise InputError(
            f'sites "GN" leaves the GN layers that the config names as they are, and {given} would '
            "change nothing; leave it out, or name other sites"
        )
    config = model if isinstance(model, dict) else {"type": model}
    built = MODELS.build({**arguments, **config})
    if sites == "GN":
        _use_fused_group_norm(built)
    else:
        injection.inject(built, sites, **options)
    injection.fuse(built)
    use_exact_boxes(built)
    return injection.recompute(built) if recompute else built


def _use_fused_group_norm(model: nn.Module) -> None:
    """Turn each nn.GroupNorm into a FusedGroupNorm, in place, with all that it holds."""
    for module in model.modules():
        if type(module) is nn.GroupNorm:
            module.__class__, module.activation = FusedGroupNorm, None
