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
from gn_det.modeling.timm_backbone.names import classifiers_of

__all__ = ["in_timms_names", "top_classes"]

_COUNTER = "num_batches_tracked"


def in_timms_names(model: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that a timm model has for them.

    Args:
        model: of timm, by its name.
        weights: by timm's names, or the tensors of the model in its order, by any. The classifier
            may be missing or of other classes, and so may BN's counters.

    Returns:
        A state dict of the model, without a classifier of other classes.

    Raises:
        InputError: another number of tensors, or one has another shape or another kind (the end of
            its name, such as ``running_var``) than the model has in its place.
    """
    timm_model = _timm_model(model)
    there = timm_model.state_dict()
    if not any(key.endswith(_COUNTER) for key in weights):
        there = {key: value for key, value in there.items() if not key.endswith(_COUNTER)}
    of_classifier = {key for key in there if key.startswith(classifiers_of(timm_model))}
    names = [*there]
    if there.keys() - of_classifier <= weights.keys():
        names = [*weights]
        named = {key: (key, value) for key, value in weights.items()}
    else:
        if len(weights) == len(there) - len(of_classifier):
            names = [key for key in names if key not in of_classifier]
        named = dict(zip(names, weights.items(), strict=False))
    found = {}
    for name, (other, value) in named.items():
        own = there.get(name)
        same_kind = name.split(".")[-1] == other.split(".")[-1]
        if own is not None and own.shape == value.shape and same_kind:
            found[name] = value
        elif name not in of_classifier or not same_kind:
            place = f"{name} {tuple(own.shape)}" if own is not None else "nothing"
            raise InputError(
                f"{other} {tuple(value.shape)} stands where timm's {model} has {place}: the "
                "weights are not in its order, nor by its names"
            )
    if len(names) != len(weights):
        raise InputError(f"there are {len(weights)} tensors, and timm's {model} has {len(there)}")
    return found


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
        InputError: the picture cannot be read, or the model has no classifier, or other classes
            than ImageNet's.
    """
    from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

    classifier = _timm_model(model).eval()
    lacking = classifier.state_dict().keys() - weights.keys()
    if any(not key.endswith(_COUNTER) for key in lacking):
        raise InputError(f"a picture needs the classifier of {model}, and the weights have none")
    classifier.load_state_dict(weights, strict=False)
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
    from gn_det.modeling.timm_backbone.names import timm_name_problem

    wrong = timm_name_problem(name)
    if wrong:
        raise InputError(f"{name!r} has to be {wrong}")
    import timm

    return timm.create_model(name)
