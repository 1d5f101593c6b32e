"""ResNets of torchvision, timm, Detectron and Detectron2, told apart and renamed by their keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from torch import Tensor

from gn_det.errors import InputError
from gn_det.text import shortened

__all__ = [
    "ResNetWeights",
    "build_resnet",
    "mmdetection_backbone",
    "resnet_weights",
    "to_detectron",
    "to_mmdetection",
]

# The name by which a layout is known; a ResNet may lie below others.
_ANCHORS = {"torchvision": "layer1.0.conv1.weight", "Detectron2": "res2.0.conv1.weight"}
# Whether blocks are bottlenecks, and blocks per stage.
_DEPTHS = {
    (False, (2, 2, 2, 2)): 18,
    (False, (3, 4, 6, 3)): 34,
    (True, (3, 4, 6, 3)): 50,
    (True, (3, 4, 23, 3)): 101,
    (True, (3, 8, 36, 3)): 152,
}
_EPS = 1e-5  # of BN in all of the layouts
_BRANCHES = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}


@dataclass(frozen=True)
class ResNetWeights:
    """A ResNet without its classifier, as Detectron2 names and configures it.

    Attributes:
        layout: what it was written for: "torchvision" (timm's is the same), "Detectron" or
            "Detectron2".
        weights: by Detectron2's names.
        resnets: by keys below MODEL.RESNETS, all that follows from names and shapes: the stride's
            place in a bottleneck and the groups of GN do not.
        dropped: names of the file that the ResNet has no use for.
        prefix: of the ResNet's names in the file.
    """

    layout: str
    weights: dict[str, Tensor]
    resnets: dict[str, Any]
    dropped: list[str]
    prefix: str = ""


def resnet_weights(checkpoint: Mapping[str, Any], prefix: str | None = None) -> ResNetWeights:
    """Find the ResNet in a checkpoint, and what Detectron2 must be told of it.

    Args:
        checkpoint: from :func:`gn_det.checkpoint.reading.read_weights`.
        prefix: of the ResNet's names, such as ``"encoder_q."``, where several are there.

    Raises:
        InputError: there is no ResNet of a known layout, several without a prefix, or one that
            Detectron2's cannot hold, with the first names of what stands against it.
    """
    weights = checkpoint["model"]
    detectron = checkpoint.get("__author__") == "Caffe2"
    has_gn = any(name.endswith("_gn_s") for name in weights)
    if detectron:
        weights, _ = convert_c2_detectron_names(weights)
    layout, prefix = _find(weights, prefix)
    resnet, dropped = {}, []
    for name, value in weights.items():
        below = name.removeprefix(prefix)
        if not name.startswith(prefix) or re.match(r"fc\.|.*num_batches_tracked$", below):
            dropped.append(name)
        elif layout == "torchvision":
            resnet[_from_torchvision(below) or below] = value
        elif re.match(r"(stem|res\d)\.", below):
            resnet[below] = value
        else:
            dropped.append(name)
    if detectron and not has_gn:
        _add_statistics(resnet)
    resnets = _inferred(resnet)
    _check(resnet, resnets)
    return ResNetWeights("Detectron" if detectron else layout, resnet, resnets, dropped, prefix)


def build_resnet(resnets: Mapping[str, Any]) -> ResNet:
    """Detectron2's ResNet with outputs "res2" to "res5".

    Args:
        resnets: by keys below MODEL.RESNETS; others are Detectron2's defaults.
    """
    cfg = get_cfg()
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


def to_detectron(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's weights by the blob names of FAIR's files (``conv1_w``, ``res2_0_branch2a_bn_s``).

    As in these, a BN is a scale and a bias into which its statistics are folded; a GN keeps its
    own.

    Args:
        weights: by Detectron2's names.
    """
    norm = "bn" if any(name.endswith("running_var") for name in weights) else "gn"
    blobs = {}
    for name, value in weights.items():
        place, tensor = name.rsplit(".", 1)
        if not place.endswith(".norm"):
            blobs[f"{_blob(place)}_w"] = value
        elif tensor == "weight":
            blob = _blob(place.removesuffix(".norm"))
            if blob == "conv1" and norm == "bn":
                blob = "res_conv1"
            scale, bias = value, weights[f"{place}.bias"]
            if norm == "bn":
                variance = weights[f"{place}.running_var"].double()
                exact = value.double() / (variance + _EPS).sqrt()
                mean = weights[f"{place}.running_mean"].double()
                scale, bias = exact.to(value.dtype), (bias.double() - mean * exact).to(value.dtype)
            blobs |= {f"{blob}_{norm}_s": scale, f"{blob}_{norm}_b": bias}
    return blobs


def to_mmdetection(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ResNet's weights by mmdetection's names (``layer1.0.gn1.weight``).

    Args:
        weights: by Detectron2's names.
    """
    norm = "bn" if any(name.endswith("running_var") for name in weights) else "gn"
    return {_to_mmdetection(name, norm): value for name, value in weights.items()}


def mmdetection_backbone(resnets: Mapping[str, Any], stride_in_1x1: bool) -> dict[str, Any]:
    """The keys of mmdetection's backbone for a ResNet.

    Args:
        resnets: by keys below MODEL.RESNETS.
        stride_in_1x1: whether bottlenecks have their stride in the first convolution.

    Raises:
        InputError: mmdetection has no such ResNet.
    """
    groups, width = resnets["NUM_GROUPS"], resnets["WIDTH_PER_GROUP"]
    if groups == 1 and width != 64:
        raise InputError(
            f"mmdetection has no ResNet whose bottlenecks are {width} wide instead of 64"
        )
    gn = {"type": "GN", "num_groups": 32, "requires_grad": True}
    return {
        **({"type": "ResNeXt", "groups": groups, "base_width": width} if groups > 1 else {}),
        "depth": resnets["DEPTH"],
        "norm_cfg": gn if resnets["NORM"] == "GN" else {"type": "BN", "requires_grad": False},
        "style": "caffe" if stride_in_1x1 else "pytorch",
    }


def _to_mmdetection(name: str, norm: str) -> str:
    *block, layer, tensor = re.sub(r"\.norm\b", "#", name).split(".")
    stage = "" if block == ["stem"] else f"layer{int(block[0][3:]) - 1}.{block[1]}."
    if layer.startswith("shortcut"):
        return f"{stage}downsample.{'1' if layer.endswith('#') else '0'}.{tensor}"
    return f"{stage}{norm if layer.endswith('#') else 'conv'}{layer.strip('conv#')}.{tensor}"


def _find(weights: Mapping[str, Tensor], prefix: str | None) -> tuple[str, str]:
    """Layout and prefix of the only ResNet, or of the one below prefix."""
    found = {
        name.removesuffix(anchor): layout
        for layout, anchor in _ANCHORS.items()
        for name in weights
        if f".{name}".endswith(f".{anchor}")
    }
    if not found:
        raise InputError(
            f"no name of the weights ends in {' or '.join(_ANCHORS.values())}, as those of a "
            f"ResNet would; they are {shortened(weights, 3)}"
        )
    if prefix is None and len(found) == 1:
        (prefix,) = found
    if prefix not in found:
        asked = "there are several ResNets" if prefix is None else f"none is below {prefix!r}"
        raise InputError(f"{asked}; name one with --prefix: {', '.join(map(repr, found))}")
    return found[prefix], prefix


def _from_torchvision(name: str) -> str | None:
    """Detectron2's name, or None where there is none."""
    pattern = r"(?:layer(\d)\.(\d+)\.)?(conv|bn|gn|downsample\.)(\d)\.(\w+)"
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    stage, block, kind, number, tensor = match.groups()
    place = f"res{int(stage) + 1}.{block}" if stage else "stem"
    if kind == "downsample.":
        norms = {"0": "", "1": ".norm"}
        return f"{place}.shortcut{norms[number]}.{tensor}" if number in norms else None
    return f"{place}.conv{number}{'' if kind == 'conv' else '.norm'}.{tensor}"


def _add_statistics(resnet: dict[str, Tensor]) -> None:
    """Give affine layers, which FAIR's BN is, the statistics with which FrozenBN is the same."""
    for name, scale in list(resnet.items()):
        if name.endswith(".norm.weight"):
            place = name.removesuffix("weight")
            resnet.setdefault(f"{place}running_mean", torch.zeros_like(scale))
            resnet.setdefault(f"{place}running_var", torch.ones_like(scale) - _EPS)


def _inferred(resnet: Mapping[str, Tensor]) -> dict[str, Any]:
    """What names and shapes say, by keys below MODEL.RESNETS."""
    blocks = [
        {m.group(1) for m in (re.match(rf"res{stage}\.(\d+)\.", name) for name in resnet) if m}
        for stage in (2, 3, 4, 5)
    ]
    bottleneck = "res2.0.conv3.weight" in resnet
    counts = tuple(map(len, blocks))
    depth = _DEPTHS.get((bottleneck, counts))
    if depth is None:
        known = ", ".join(str(depth) for depth in _DEPTHS.values())
        kind = "bottlenecks" if bottleneck else "basic blocks"
        raise InputError(f"{counts} {kind} in res2 to res5 are no ResNet of depth {known}")
    if bottleneck:
        channels, width = _conv_shape(resnet, "res2.0.conv2")[:2]
        if channels % width:
            raise InputError(f"no groups take res2.0.conv2 from {width} channels to {channels}")
    groups, width = (channels // width, width) if bottleneck else (1, 64)
    norm = "FrozenBN" if any(name.endswith("running_mean") for name in resnet) else "GN"
    return {
        "DEPTH": depth,
        "NORM": norm,
        "NUM_GROUPS": groups,
        "WIDTH_PER_GROUP": width,
        "RES2_OUT_CHANNELS": _conv_shape(resnet, f"res2.0.conv{3 if bottleneck else 2}")[0],
    }


def _conv_shape(resnet: Mapping[str, Tensor], place: str) -> torch.Size:
    weight = resnet.get(f"{place}.weight")
    if weight is None or weight.dim() != 4 or not weight.numel():
        raise InputError(f"{place} is no convolution, as it would be in a ResNet")
    return weight.shape


def _check(resnet: Mapping[str, Tensor], resnets: Mapping[str, Any]) -> None:
    try:
        with torch.device("meta"):
            expected = build_resnet(resnets).state_dict()
    except (AssertionError, ValueError) as error:  # channels that its blocks do not take
        raise InputError(f"Detectron2's ResNet cannot be {dict(resnets)}: {error}") from error
    shapes = [
        f"{name} of {tuple(value.shape)} for {tuple(expected[name].shape)}"
        for name, value in resnet.items()
        if name in expected and value.shape != expected[name].shape
    ]
    faults = [
        ("has", [name for name in resnet if name not in expected]),
        ("lacks", [name for name in expected if name not in resnet]),
        ("has", shapes),
    ]
    described = [f"it {verb} {shortened(names, 3)}" for verb, names in faults if names]
    if described:
        raise InputError(
            f"Detectron2's ResNet-{resnets['DEPTH']} cannot hold this one: {'; '.join(described)} "
            "(deep stems, average pooling in shortcuts, squeeze-and-excitation and the like are "
            "not in it)"
        )


def _blob(place: str) -> str:
    """FAIR's name of a convolution: conv1, res2_0_branch2a."""
    if place == "stem.conv1":
        return "conv1"
    stage, block, conv = place.split(".")
    return f"{stage}_{block}_{_BRANCHES[conv]}"
