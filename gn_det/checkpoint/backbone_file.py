"""Writing a backbone's weights, and beside them the config that a detector shares with them."""

from __future__ import annotations

import pickle
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from gn_det.errors import InputError
from gn_det.files import make_folder, whole_file, write_atomically

__all__ = ["check_backbone_file", "write_backbone", "write_backbone_for_mmdetection"]

_ENDINGS = (".pth", ".safetensors", ".pkl")


def check_backbone_file(file: Path, mmdetection: bool = False) -> None:
    """Check that a function of this module can write a file, before there is what it is to hold.

    Args:
        file: of the weights.
        mmdetection: whether it is for mmdetection, which reads .pth alone.

    Raises:
        InputError: another ending than .pth, .safetensors or .pkl, a file that exists, or a folder
            that cannot be written.
    """
    if mmdetection and file.suffix != ".pth":
        raise InputError(f"mmdetection's layout is one of .pth files, and {file} is none")
    if file.suffix not in _ENDINGS:
        raise InputError(f"{file} ends in none of {', '.join(_ENDINGS)}")
    for path in (file, file.with_suffix(".py" if mmdetection else ".yaml")):
        if path.exists():
            raise InputError(f"{path} exists; remove it, or name another")
    make_folder(file.parent)


def write_backbone(file: Path, weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a backbone's weights, and a config fragment for the detectors that start from them.

    Detectron2 (for .safetensors: gn_det's Checkpointer) finds the backbone's place in a detector
    by the ends of the names. The fragment, beside the weights with the ending .yaml, has the
    config's keys and MODEL.WEIGHTS. A config takes both a recipe and the fragment by::

        _BASE_: [recipe.yaml, weights.yaml]

    where later files win, and paths count from the config's own folder.

    Args:
        file: .pth, .safetensors, or .pkl of Detectron2's model zoo; its folder is made.
        weights: by Detectron2's names (``stem.conv1.weight``), or, with .pkl alone, by Detectron's
            (``conv1_w``), on any device.
        config: values by whole keys of Detectron2's config, such as
            ``{"MODEL.RESNETS.STRIDE_IN_1X1": False, "INPUT.FORMAT": "RGB"}``.

    Raises:
        InputError: as :func:`check_backbone_file`, or the disk is full. Neither file is there then.
    """
    check_backbone_file(file)
    weights = _on_cpu(weights)
    try:
        with whole_file(file) as stream:
            if file.suffix == ".safetensors":
                stream.write(safetensors.torch.save(weights, {"matching_heuristics": "True"}))
            elif file.suffix == ".pkl":
                pickle.dump(_pickled(weights), stream, protocol=2)
            else:
                torch.save({"model": weights, "matching_heuristics": True}, stream)
        write_atomically(file.with_suffix(".yaml"), _fragment(file, config))
    except InputError:
        file.unlink(missing_ok=True)
        raise


def write_backbone_for_mmdetection(
    file: Path, weights: Mapping[str, Tensor], model: Mapping[str, Any]
) -> None:
    """Write a backbone's weights for mmdetection, and what a config shares with them.

    The fragment, beside the weights with the ending .py, is the lower part of a config that
    inherits from another one.

    Args:
        file: .pth; its folder is made.
        weights: by mmdetection's names (``layer1.0.gn1.weight``), on any device.
        model: keys of a config's ``model``; the backbone's init_cfg is added.

    Raises:
        InputError: as :func:`check_backbone_file`, or the disk is full. Neither file is there then.
    """
    check_backbone_file(file, mmdetection=True)
    backbone = {**model["backbone"], "init_cfg": {"type": "Pretrained", "checkpoint": str(file)}}
    text = pprint.pformat({**model, "backbone": backbone}, sort_dicts=False, width=88)
    head = f"# What a detector shares with {file.name!a}. Name a config to start from:"
    try:
        with whole_file(file) as stream:
            torch.save({"state_dict": _on_cpu(weights)}, stream)
        write_atomically(file.with_suffix(".py"), f'{head}\n# _base_ = "..."\nmodel = {text}\n')
    except InputError:
        file.unlink(missing_ok=True)
        raise


def _on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
    }


def _pickled(weights: dict[str, Tensor]) -> dict[str, Any]:
    arrays = {
        name: (value.float() if value.dtype is torch.bfloat16 else value).numpy()
        for name, value in weights.items()
    }
    if not any("." in name for name in arrays):
        return {"blobs": arrays}
    return {"model": arrays, "__author__": "gn_det", "matching_heuristics": True}


def _fragment(file: Path, config: Mapping[str, Any]) -> str:
    nested: dict[str, Any] = {}
    for key, value in {**config, "MODEL.WEIGHTS": str(file), "VERSION": 2}.items():
        *parents, last = key.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(nested, sort_keys=False, default_flow_style=None, allow_unicode=True)
    name = file.with_suffix(".yaml").name
    return f"# What a detector shares with {file.name}: _BASE_: [recipe.yaml, {name}]\n{text}"
