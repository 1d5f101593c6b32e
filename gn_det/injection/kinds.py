"""What a module is, told without the library that it comes from: norms, convolutions, activations.

Classes are known by their names, so that no library needs to be installed for another's models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.errors import InputError

__all__ = [
    "Layer",
    "is_a",
    "is_called_norm",
    "is_conv",
    "is_norm",
    "is_scripted",
    "library_of",
    "normalizes",
    "num_channels",
    "own_methods",
    "type_name",
    "upwards",
]

# A convolution, norm or head of any library, or None: nn.Module declares none of their attributes.
Layer = Any

# BN and GN of PyTorch are found by isinstance, where forward comes from one of these.
_LIBRARIES = {"detectron2", "fvcore", "gn_det", "mmcv", "mmengine", "timm", "torch", "torchvision"}
_FROZEN_AND_CYCLED = (
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.CycleBatchNormList",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
)
_NORM_NAMES = re.compile(r"\w*((?i:norm)|(BN|GN|GRN|FRN)(?!N))\w*")  # no GNN


def type_name(kind: type) -> str:
    """``package.module.Class``; a class that ``type(...)`` made may have no module."""
    return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"


def library_of(code: object) -> str:
    """The package that a class or function comes from, or ``""``."""
    return (getattr(code, "__module__", None) or "").split(".")[0]


def own_methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods of a class and its bases by name, less those of PyTorch and mmengine."""
    for base in kind.__mro__:
        if library_of(base) not in ("torch", "mmengine"):
            for name, function in vars(base).items():
                if isinstance(function, FunctionType):
                    yield name, function


def is_a(module: nn.Module, *names: str) -> bool:
    """isinstance by the name of the class."""
    return any(type_name(kind) in names for kind in type(module).__mro__)


def is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a BN, SyncBN, FrozenBN or GN layer that FusedGroupNorm can replace."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        # A class of the user's own may compute something else; and a weight that is pruned or
        # parametrized is no parameter of the norm.
        return library_of(type(module).forward) in _LIBRARIES and "weight" in module._parameters
    return module is not None and (is_a(module, *_FROZEN_AND_CYCLED) or _is_frozen_copy(module))


def _is_frozen_copy(module: nn.Module) -> bool:
    """Whether a module is a FrozenBatchNorm2d of a project's own, as DETR and its copies have."""
    own = type(module).__name__.endswith("FrozenBatchNorm2d") and not module._parameters
    return own and {"weight", "bias", "running_mean", "running_var"} <= module._buffers.keys()


def is_called_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by the name of its class, or by running statistics as BN has."""
    return bool(_NORM_NAMES.fullmatch(type(module).__name__)) or "running_mean" in module._buffers


def normalizes(module: nn.Module, channels: int) -> bool:
    """Whether a module is a norm of so many channels of a map, of any kind, or holds one.

    What also holds a convolution, or a linear layer, is more than a norm. Kinds other than BN and
    GN are told by their names; nn.LayerNorm itself is of tokens.
    """
    parts = [*module.modules()]
    if any(is_conv(part) or isinstance(part, nn.Linear) for part in parts):
        return False
    return any(
        (is_norm(part) or is_called_norm(part))
        and type(part) is not nn.LayerNorm
        and _width(part) == channels
        for part in parts
    )


def _width(norm: Layer) -> int | None:
    for name in ("num_features", "num_channels"):
        if isinstance(getattr(norm, name, None), int):
            return getattr(norm, name)
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else None


def is_conv(module: nn.Module | None) -> bool:
    """Whether a module is a convolution of PyTorch's or a subclass, or a deformable one."""
    if is_scripted(module):  # which takes no norm
        return False
    return isinstance(module, nn.modules.conv._ConvNd) or (
        getattr(module, "weight", None) is not None
        and hasattr(module, "kernel_size")
        and hasattr(module, "out_channels")
    )


def is_scripted(module: nn.Module | None) -> bool:
    """Whether a module is TorchScript, with a forward that no Python sees."""
    return isinstance(module, torch.jit.ScriptModule)


def num_channels(norm: Layer) -> int:
    """C of a norm of any kind."""
    channels: Any = _width(norm)
    if channels == 0:
        raise InputError(
            f"a {type(norm).__name__} has no channels yet: run the model on a batch first"
        )
    return channels


def upwards(name: str) -> Iterator[str]:
    """The name of a module, and of all who hold it, up to the model's, which is empty."""
    yield name
    while name:
        name = name.rpartition(".")[0]
        yield name
