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
from gn_det.injection.inject import has_bns_values
from gn_det.modeling.bn_weights import warn_once
from gn_det.modeling.with_gn import inject_options_from_config, puts_gn_into_the_backbone
from gn_det.utils import whole_file

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


def check_gn_of_weights(cfg: CfgNode, weights: str, body: nn.Module) -> None:
    """Check that the norms that a config gives a timm backbone are those of its weights.

    Args:
        cfg: of the model.
        weights: "timm", or the file.
        body: timm's model with them.

    Raises:
        InputError: the weights were made for other GN, or for GN where a hand-over begins with BN.
    """
    made_for = _made_for(weights)
    gn = inject_options_from_config(cfg)
    hands_over, has_gn = cfg.MODEL.GN.HAND_OVER_STEPS > 0, puts_gn_into_the_backbone(cfg)
    if made_for is None:
        if has_gn and not hands_over and any(map(_has_values_of_bn, body.modules())):
            warn_once(
                f"MODEL.TIMM.WEIGHTS, {weights}, has BN: GN takes its γ and β without its "
                f"statistics. Convert it (tools/convert_bn_to_gn.py --backbone), or {_HAND_OVER}"
            )
    elif hands_over:
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {weights} has γ and β of GN, and a hand-over begins with BN: name "
            "the weights that it was converted from, or set MODEL.GN.HAND_OVER_STEPS to 0"
        )
    elif not has_gn:
        warn_once(
            f"MODEL.TIMM.WEIGHTS, {weights}, was converted for GN, and the config gives the "
            "backbone none. Unless your code injects it, name the weights with BN"
        )
    elif made_for != gn:
        raise InputError(
            f"MODEL.TIMM.WEIGHTS {weights} was converted for GN of {made_for}, and MODEL.GN says "
            f"{gn}; take the same, or convert the weights with BN anew"
        )


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
