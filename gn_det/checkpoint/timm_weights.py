"""Weights of another library for a model of timm, where their tensors have the same order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gn_det.data.pictures import read_picture
from gn_det.errors import InputError

__all__ = ["in_timms_names", "top_classes"]


def in_timms_names(model: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that a timm model has for them.

    Args:
        model: of timm, by its name.
        weights: as many tensors as the model has, in its order.

    Returns:
        A state dict of the model.

    Raises:
        InputError: another number of tensors, or one has another shape or another kind (the end of
            its name, such as ``running_var``) than the model has in its place.
    """
    there = _timm_model(model).state_dict()
    for (name, own), (other, theirs) in zip(there.items(), weights.items(), strict=False):
        same_kind = name.split(".")[-1] == other.split(".")[-1]
        if own.shape != theirs.shape or not same_kind:
            raise InputError(
                f"{other} {tuple(theirs.shape)} stands where timm's {model} has {name} "
                f"{tuple(own.shape)}: the weights are not in its order"
            )
    if len(there) != len(weights):
        raise InputError(f"there are {len(weights)} tensors, and timm's {model} has {len(there)}")
    return dict(zip(there, weights.values(), strict=True))


def top_classes(
    model: str, weights: Mapping[str, Tensor], picture: Path, most: int = 5
) -> list[tuple[str, float]]:
    """What a timm classifier of ImageNet sees in a picture, as a check of its weights.

    Args:
        model: of timm, by its name.
        weights: its state dict.
        picture: file of a photograph.
        most: how many classes.

    Returns:
        (class, probability from 0 to 1), the most probable first.

    Raises:
        InputError: the picture cannot be read, or the model has other classes than ImageNet's.
    """
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    classifier = _timm_model(model).eval()
    classifier.load_state_dict(weights)
    pixels = Image.fromarray(read_picture(picture, "RGB"))
    transform = create_transform(**resolve_model_data_config(classifier))
    with torch.no_grad():
        probabilities = classifier(transform(pixels)[None]).softmax(1)[0]
    if len(probabilities) != 1000:
        raise InputError(f"{model} has {len(probabilities)} classes, not ImageNet's 1000")
    names = ImageNetInfo()
    best = np.argsort(-probabilities.numpy())[:most]
    return [(names.index_to_description(int(i)), float(probabilities[i])) for i in best]


def _timm_model(name: str) -> Any:
    from gn_det.modeling.timm_backbone import check_timm_name

    wrong = check_timm_name(name)
    if wrong:
        raise InputError(f"{name!r} has to be {wrong}")
    import timm

    return timm.create_model(name)
