"""Mean, deviation and colours of the pictures that timm's models take."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from gn_det.errors import InputError
from gn_det.modeling.timm_backbone.backbone import TimmBackbone
from gn_det.modeling.timm_backbone.converted import check_gn_of_weights
from gn_det.modeling.timm_backbone.names import timm_name_problem
from gn_det.text import reason_of

__all__ = ["check_input", "check_timm_input", "timm_input"]

# Mean and deviation of the pictures, and their colours.
Input = tuple[Sequence[float], Sequence[float], str | None]
# Where the config says no mean, deviation and colours, it has Detectron2's.
_DETECTRON2_INPUT = ((103.53, 116.28, 123.675), (1.0, 1.0, 1.0), "BGR")


def timm_input(name: str) -> tuple[list[float], list[float], str]:
    """Mean and standard deviation of the pictures that a timm model takes, and their colours.

    Args:
        name: of the model.

    Returns:
        Mean and deviation of each channel, of values from 0 to 255, and "RGB".

    Raises:
        InputError: timm does not know the name, or cannot reach the repository that it names.
    """
    wrong = timm_name_problem(name)
    if wrong:
        raise InputError(f"MODEL.TIMM.NAME is {name!r}, and has to be {wrong}")
    import timm

    if ":" in name:
        try:
            config = timm.create_model(name, pretrained=False).pretrained_cfg
        except Exception as error:  # of folders and of the network
            raise InputError(
                f"MODEL.TIMM.NAME {name!r}: timm cannot build it: {reason_of(error)}"
            ) from error
    else:
        config = timm.get_pretrained_cfg(name).to_dict()
    mean, std = ([round(255 * x, 3) for x in config[key]] for key in ("mean", "std"))
    return mean, std, "RGB"


def check_timm_input(model: nn.Module, *, starts_from_weights: bool) -> None:
    """Check that a detector gives its timm backbones what their weights take.

    Weights that were converted for GN, in a backbone without it, are warned of.

    Args:
        model: built from a LazyConfig; the builders of YAML configs check by themselves.
        starts_from_weights: whether it loads weights of the whole detector.

    Raises:
        InputError: model.pixel_mean, pixel_std or input_format is not that of timm's weights.
    """
    for backbone in [module for module in model.modules() if isinstance(module, TimmBackbone)]:
        if backbone.weights and not any(isinstance(m, nn.GroupNorm) for m in backbone.modules()):
            check_gn_of_weights(backbone.weights, backbone.body, None, hands_over=False)
        if hasattr(model, "pixel_mean") and hasattr(model, "pixel_std"):
            mean, std = (  # as they were before they became float32
                tuple(round(value, 3) for value in x.flatten().tolist())
                for x in (model.pixel_mean, model.pixel_std)
            )
            there = mean, std, getattr(model, "input_format", None)
            weights = starts_from_weights or bool(backbone.weights)
            check_input(backbone.name, there, starts_from_weights=weights)


def check_input(name: str, there: Input, *, starts_from_weights: bool) -> None:
    mean, std, colours = timm_input(name)
    same = there[2] in (colours, None) and all(  # some models do not say their colours
        len(ours) == len(theirs)
        and all(abs(a - b) <= 0.5 for a, b in zip(ours, theirs, strict=True))
        for ours, theirs in zip(there, (mean, std), strict=False)
    )
    log = logging.getLogger(__name__)
    if same:
        log.info(f"{name} takes {colours}, mean {mean}, deviation {std}")
    elif there == _DETECTRON2_INPUT and not starts_from_weights:
        log.info(f"{name} starts at random, with Detectron2's colours and means")
    else:
        advice = (
            "write timm's values there. Weights that have learnt with others need a folder whose "
            "config.json has these (MODEL.TIMM.NAME local-dir:FOLDER)"
        )
        if len(there[0]) != 3 or len(there[1]) != 3:
            advice = "a backbone of timm takes pictures of 3 channels here"
        elif max(there[0]) <= 1:
            advice = "these are for pixels from 0 to 1, and a detector's go to 255"
        raise InputError(
            f"{name} of timm takes INPUT.FORMAT {colours}, MODEL.PIXEL_MEAN {mean} and "
            f"MODEL.PIXEL_STD {std} (of a LazyConfig: input_format, pixel_mean and pixel_std of "
            f"the model), and the config says {there[2]}, {list(there[0])} and {list(there[1])}; "
            f"{advice}"
        )
