"""Weights of timm backbones for GN: files of a conversion say which GN they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.files import whole_file
from gn_det.injection.inject import has_bns_values
from gn_det.modeling.bn_weights import log_once
from gn_det.modeling.with_gn import inject_options_from_config

__all__ = ["check_gn_of_weights", "write_converted"]

_MADE_FOR = "gn_det_made_for"
_HAND_OVER = "hand over from BN by MODEL.GN.HAND_OVER_STEPS"


def write_converted(file: Path, state: Mapping[str, Tensor], cfg: CfgNode) -> None:
    """Write weights for MODEL.TIMM.WEIGHTS that were converted from BN to the GN of a config.

    Args:
        file: to write, whole or not at all.
        state: of timm's model: γ and β of GN, and the statistics of BN, which the model is built
            with before it gets GN.
        cfg: with the groups and MODEL.GN.WEIGHT_STANDARDIZATION.
    """
    with whole_file(file) as stream:
        torch.save({"state_dict": dict(state), _MADE_FOR: inject_options_from_config(cfg)}, stream)


def check_gn_of_weights(
    weights: str, body: nn.Module, gn: Mapping[str, Any] | None, *, hands_over: bool
) -> None:
    """Check that the norms that a timm backbone gets are those of its weights.

    Args:
        weights: "timm", or the file.
        body: timm's model with them.
        gn: options of :func:`gn_det.inject` with which the backbone gets GN; None where it gets
            none.
        hands_over: whether its GN takes over from BN.

    Raises:
        InputError: the weights were made for other GN, or for GN where a hand-over begins with BN.
    """
    made_for = _made_for(weights)
    if made_for is None:
        if gn is not None and not hands_over and any(map(_has_values_of_bn, body.modules())):
            log_once(
                f"MODEL.TIMM.WEIGHTS, {weights}, has BN: GN takes its γ and β without its "
                f"statistics. Convert it (tools/convert_bn_to_gn.py --backbone), or {_HAND_OVER}"
            )
    elif hands_over:
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {weights} has γ and β of GN, and a hand-over begins with BN: name "
            "the weights that it was converted from, or set MODEL.GN.HAND_OVER_STEPS to 0"
        )
    elif gn is None:
        log_once(
            f"MODEL.TIMM.WEIGHTS, {weights}, was converted for GN, and the config gives the "
            "backbone none. Unless your code injects it, name the weights with BN"
        )
    elif _all_options(made_for) != _all_options(gn):
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {weights} was converted for GN of {_all_options(made_for)}, and "
            f"MODEL.GN says {_all_options(gn)}; take the same, or convert the weights with BN anew"
        )


def _all_options(gn: Mapping[str, Any]) -> dict[str, Any]:
    """Options of inject that say what the norms are, with their defaults."""
    size = gn.get("channels_per_group")
    groups = {"channels_per_group": size} if size else {"num_groups": gn.get("num_groups") or 32}
    return {
        **groups,
        "min_channels_per_group": gn.get("min_channels_per_group") or 1,
        "weight_standardization": bool(gn.get("weight_standardization")),
    }


def _made_for(weights: str) -> dict[str, Any] | None:
    """What a file of a conversion was made for; None for other weights."""
    with suppress(Exception):  # of what is no archive of PyTorch
        loaded = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        return loaded.get(_MADE_FOR)
    return None


def _has_values_of_bn(module: nn.Module) -> bool:
    if isinstance(module, nn.GroupNorm):
        return has_bns_values(module)
    return isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d))
