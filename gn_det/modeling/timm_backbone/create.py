"""A model of timm with its feature maps and its weights."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import torch

from gn_det.errors import InputError
from gn_det.modeling.timm_backbone.names import timm_name_problem
from gn_det.modeling.timm_backbone.state import (
    check_all_loaded,
    check_none_left,
    fits,
    read_state,
    without_prefix,
)
from gn_det.text import reason_of, shortened

__all__ = ["create"]

_STRIDES = (4, 8, 16, 32)  # of the levels that FPN takes


def create(name: str, out_indices: tuple[int, ...], weights: str) -> Any:
    """timm's model with its features, on the CPU."""
    wrong = timm_name_problem(name)
    if wrong:
        raise InputError(f"timm backbone {name!r}: it has to be {wrong}")
    import timm

    state = read_state(weights) if weights not in ("", "timm") else None
    try:
        flags, body = _of_any_size(name)
        indices = _indices(name, body, out_indices)
        flags |= {"features_only": True, "out_indices": indices}
        if state is None:
            body = timm.create_model(name, pretrained=bool(weights), **flags)
        else:
            body = timm.create_model(name, **flags)
            with torch.random.fork_rng(devices=[]):
                whole = timm.create_model(name)
            state = without_prefix(state, {*body.state_dict(), *whole.state_dict()})
            by_name = fits(body, state)
            check_none_left(whole, body, state, weights, by_name=by_name)
            if by_name:
                body.load_state_dict(state, strict=False)
            else:  # names of the whole model, or of another version of it, which timm translates
                source = {"pretrained_cfg_overlay": {"state_dict": state}}
                body = timm.create_model(name, pretrained=True, **flags, **source)
    except InputError:
        raise
    except Exception as error:  # of timm's many models, and of the network
        what = f" with the weights {weights}" if weights else ""
        advice = "; MODEL.TIMM.WEIGHTS can name a file" if weights == "timm" else ""
        reason = " ".join(str(error).split())[:300] or reason_of(error)
        raise InputError(f"timm cannot build {name}{what}: {reason}{advice}") from error
    if state is not None:
        check_all_loaded(body, state, weights)
    source_of = weights or "none, a random start"
    logging.getLogger(__name__).info(f"timm {name}: weights {source_of}")
    return body


def _of_any_size(name: str) -> tuple[dict[str, bool], Any]:
    """The model at a random start, and the argument by which it takes pictures of any size.

    Transformers have one, by one of two names. Convolutional models know neither.
    """
    import timm

    for flags in ({"dynamic_img_size": True}, {"strict_img_size": False}):
        with suppress(TypeError):
            return flags, timm.create_model(name, features_only=True, **flags)
    return {}, timm.create_model(name, features_only=True)


def _indices(name: str, body: Any, out_indices: tuple[int, ...]) -> tuple[int, ...]:
    """Which of its feature maps a model shall give, in their order."""
    levels = [level["reduction"] for level in body.feature_info.info]
    out_indices = out_indices or tuple(i for i, s in enumerate(levels) if s in _STRIDES)
    if not out_indices:
        raise InputError(
            f"{name} has feature maps of strides {levels}, and none of {shortened(_STRIDES, 4)}"
        )
    if not all(-len(levels) <= index < len(levels) for index in out_indices):
        raise InputError(
            f"MODEL.TIMM.OUT_INDICES (out_indices) {list(out_indices)}: {name} has "
            f"{len(levels)} feature maps, 0 to {len(levels) - 1}, of strides {levels}"
        )
    return tuple(sorted(index % len(levels) for index in out_indices))
