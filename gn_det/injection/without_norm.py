"""Convolutions without a norm in parts of classes that nobody knows: whether they can gain one.

A norm may come between a convolution and the activation of a feature map, and in a pyramid. What
the module itself shows of that counts: an activation behind it in an nn.Sequential, one that the
convolution or its ConvModule applies, or one in the code of a class whose other convolutions take
what this one puts out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set
from itertools import pairwise
from typing import NamedTuple

from torch import nn

from gn_det.injection.indexed import takes_by_number
from gn_det.injection.kinds import (
    Layer,
    is_conv,
    is_norm,
    library_of,
    normalizes,
    upwards,
)
from gn_det.injection.one_pixel import is_gate, names_used
from gn_det.injection.parts import Part
from gn_det.layers.conv_norm import takes_norm

__all__ = ["ConvScan", "ConvWithoutNorm", "is_conv_module"]


class ConvWithoutNorm(NamedTuple):
    """A convolution without a norm behind it.

    Attributes:
        name: of the convolution.
        conv: it.
        site: key of SITES.
        why_not: the reason for not adding a norm; empty where one fits.
        holder: who could hold the norm: its ConvModule, its nn.Sequential, or itself; None where
            nobody can.
    """

    name: str
    conv: Layer
    site: str
    why_not: str
    holder: Layer


_GATE = "in an attention or a gate, whose answer a norm may make the same for every picture"
_DYNAMIC = "predicts the weights or the sampling points of other convolutions"
_PREDICTOR = "a predictor, whose output is the result"
_SHARED = "modules of several parents share it"

_GATE_NAMES = re.compile(
    r"(\w*_)?(se|gates?|gating)\d*(_\w*)?|\w*(attn|attention|excit|squeeze|spatialatt)\w*",
    re.IGNORECASE,
)
_GATE_CLASSES = re.compile(
    r"(?!\w*Head$)\w*(Attention|Attn|Squeeze|SELayer|SEModule|SEBlock|Gate|CBAM|DyReLU|NonLocal)\w*"
)
_DYNAMIC_NAMES = {"controller", "dynamic", "hyper", "offset", "offsets", "condconv", "generator"}
_DYNAMIC_CLASSES = re.compile(r"\w*(Cond|Dynamic|Hyper)\w*Conv\w*")
# Words in the name of a convolution that predicts, where none of the second says that it does not.
_PREDICTED = {
    "predictor", "predict", "pred", "preds", "logit", "logits", "score", "scores", "cls", "reg",
    "box", "bbox", "delta", "deltas", "objectness", "anchor", "anchors", "centerness", "ctrness",
    "iou", "heatmap", "hm", "wh", "kernel", "params", "embed", "embedding", "seg", "output", "out",
    "final", "last", "classifier", "mask", "masks", "top", "proj",
}  # fmt: skip
_OF_TOWERS = {"convs", "tower", "towers", "subnet", "fcn", "fcns", "stem", "stacked"}
_ACTIVATIONS = re.compile(r"\w*(relu|gelu|silu|selu|elu|swish|mish)\d?_?", re.IGNORECASE)
_OF_BLOCKS = re.compile(r"conv\d+|shortcut")
_LATERAL = re.compile(r"adapter|lateral|inner|reduc")  # of a pixel decoder
_TOP = re.compile(r"\w*(p[67]|extra)\w*")
_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_BLOCK_CLASSES = re.compile(r"\w*(Block|Stem|Bottleneck)\w*")
# Levels of a pyramid end in these, which elsewhere tell of a predictor.
_OF_PYRAMIDS = {"output", "out", "top", "proj"}


def is_conv_module(module: Layer) -> bool:
    """Whether a module is mmcv's ConvModule, or made like it: convolution, norm, activation."""
    return hasattr(module, "with_norm") and hasattr(module, "norm_name") and hasattr(module, "conv")


class ConvScan:
    """What is to be seen of the convolutions of a model.

    Args:
        model: any model.
        parts: see :func:`gn_det.injection.parts.parts_of`.
        gated: the modules of gates, see :mod:`gn_det.injection.one_pixel`.

    Attributes:
        taken_norms: those that are known to be of a convolution.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], gated: set[nn.Module]) -> None:
        self.parts, self.gated = parts, gated
        self.taken_norms: set[nn.Module] = set()
        self.names: dict[str, Layer] = dict(model.named_modules())
        self.parents: defaultdict[nn.Module, list[nn.Module]] = defaultdict(list)
        for parent in self.names.values():
            for child in parent.children():
                self.parents[child].append(parent)
        self.widths: dict[str, int] = {}  # of pyramids, by the name of the part
        widths: defaultdict[str, Counter[int]] = defaultdict(Counter)
        self.taken: defaultdict[str, Counter[int]] = defaultdict(Counter)  # channels, by part
        for name, module in self.names.items():
            part = parts[name].name
            if is_conv(module):
                widths[part][module.out_channels] += 1
                self.taken[part][module.in_channels] += 1
            elif isinstance(module, nn.Linear):
                self.taken[part][module.in_features] += 1
        self.widths = {part: max(each, key=lambda c: (each[c], c)) for part, each in widths.items()}

    def convs_without_norm(self, normed: set[nn.Module]) -> Iterator[ConvWithoutNorm]:
        """Yields every convolution, but those that have a norm or a place for one that is known.

        Args:
            normed: the convolutions that have, or are such a place.
        """
        for name, conv in self.names.items():
            if is_conv(conv) and conv not in normed and not is_norm(conv):
                site, holder = self.site(name, conv), self._holder(name, conv)
                yield ConvWithoutNorm(name, conv, site, self._why_not(name, conv, holder), holder)

    def site(self, name: str, conv: Layer) -> str:
        """The site of a convolution, by its name."""
        site = self.parts[name].site
        if site == "fpn" and (_TOP.fullmatch(name.rpartition(".")[2]) or self._is_extra(name)):
            return "fpn.top_block"
        if site == "mask_head" and getattr(conv, "transposed", False):
            return "mask_head.deconv"
        return site

    def _why_not(self, name: str, conv: Layer, holder: Layer) -> str:
        part = self.parts[name]
        above = self._above(name)
        owner = self._owner(name)
        nowhere = f"no norm, and {type(owner).__name__} has no place for one"
        unknown = f"no norm, and what follows it in {type(owner).__name__} is not known"
        if self._is_gate(name, conv, above):
            return _GATE
        if self._is_dynamic(name, conv, above):
            return _DYNAMIC
        if then := self._norm_behind(conv):
            return f"behind it is {type(then).__name__}, which stays"
        if part.site == "other" or not part.open:
            in_head = part.site not in ("other", "backbone", "fpn", "fpn.top_block")
            return _PREDICTOR if in_head and _predicts(name) else nowhere
        if self._is_followed(name, conv, part):
            if holder is None:
                return f"no norm, and {type(conv).__name__} has no place for one"
            return _SHARED if holder is not conv and len(self.parents[conv]) > 1 else ""
        return _PREDICTOR if _predicts(name) or not self._feeds(conv, part) else unknown

    def _holder(self, name: str, conv: Layer) -> Layer:
        for parent in self.parents[conv]:
            if is_conv_module(parent) and parent.conv is conv:
                return parent if not parent.norm_name and _norm_comes_second(parent) else None
        if hasattr(conv, "norm"):
            return conv if conv.norm is None or type(conv.norm) is nn.Identity else None
        for parent in self.parents[conv]:
            # Code of a backbone may take features by their index, and names have no order.
            in_backbone = self.parts[name].site == "backbone"
            fits = _is_tower(parent, conv) and not self._is_taken_by_number(name, parent)
            if fits and not in_backbone:
                return parent
        return conv if takes_norm(conv) else None

    def _is_followed(self, name: str, conv: Layer, part: Part) -> bool:
        """Whether a norm fits: an activation comes next, or a level of a pyramid."""
        site = self.site(name, conv)
        if conv.out_channels < 8 or _words(name) & _DYNAMIC_NAMES:
            return False
        parents = self.parents[conv]
        for parent in parents:
            if is_conv_module(parent):
                return bool(getattr(parent, "with_activation", False)) or self._is_level(name)
        sequences = [parent for parent in parents if isinstance(parent, nn.Sequential)]
        if any(_before_activation(parent, conv) for parent in sequences):
            return self._feeds(conv, part) or not _predicts(name)
        if self._has_norm_beside(name, conv):
            return False
        if _is_activation(getattr(conv, "activation", None)) and hasattr(conv, "norm"):
            return True
        if any(_before_resizing(parent, conv) for parent in sequences):
            return False
        owner = self._owner(name)
        leaf = name.rpartition(".")[2]
        if site in ("fpn", "fpn.top_block"):
            wide = site != "fpn" or conv.out_channels == self.widths[part.name]
            plain = conv.groups == 1 and not _predicts(name, _OF_PYRAMIDS)
            return wide and plain and self._is_level(name)
        if site == "backbone":
            is_block = _BLOCK_CLASSES.fullmatch(type(owner).__name__) is not None
            is_named = hasattr(conv, "norm") and _OF_BLOCKS.fullmatch(leaf) is not None
            return is_block and is_named and _activates(owner)
        if site == "sem_seg_head" and hasattr(conv, "norm") and _LATERAL.match(leaf):
            return True
        if getattr(conv, "transposed", False) and site != "mask_head.deconv":
            return False
        return _activates(owner) and self._feeds(conv, part) and not _predicts(name)

    def _norm_behind(self, conv: Layer) -> nn.Module | None:
        """The norm of a kind that nobody knows that follows a convolution in an nn.Sequential."""
        for parent in self.parents[conv]:
            for then in _behind(parent, conv) if isinstance(parent, nn.Sequential) else ():
                if then is not None and normalizes(then, conv.out_channels):
                    return then
        return None

    def _has_norm_beside(self, name: str, conv: Layer) -> bool:
        """Whether there is a norm that may be this convolution's.

        One directly beside it may be, though it is known to be another's: blocks have one norm
        behind several convolutions. One in a list may be, where nobody knows whose it is.
        """
        beside = [child for parent in self.parents[conv] for child in parent.children()]
        if any(is_norm(child) or normalizes(child, conv.out_channels) for child in beside):
            return True
        for above in [*upwards(name)][1:]:
            holder = self.names[above]
            for child in holder.children():
                of_others = self.taken_norms.issuperset(_leaves(child))
                if normalizes(child, conv.out_channels) and not of_others:
                    return True
            if type(holder) not in _LISTS:
                return False
        return False

    def _is_level(self, name: str) -> bool:
        """Whether a convolution is a pyramid's own, and not one of a module within it."""
        owner, part = self._owner(name.removesuffix(".conv")), self.parts[name]
        root = self.names[part.name]
        own = owner is root or (isinstance(root, _LISTS) and owner in {*root.children()})
        return own and part.site in ("fpn", "fpn.top_block")

    def _feeds(self, conv: Layer, part: Part) -> bool:
        """Whether another layer of the part takes as many channels as a convolution puts out."""
        taken, channels = self.taken[part.name], conv.out_channels
        own = 1 if conv.in_channels == channels else 0
        flattened = any(n > channels and n % channels == 0 for n in taken if n >= 4 * channels)
        return taken[channels] > own or flattened

    def _above(self, name: str) -> list[tuple[str, nn.Module]]:
        """(attribute, module) of what a module lies in, within its part, and of itself."""
        part = self.parts[name].name
        names = name.split(".")
        whole = [".".join(names[: n + 1]) for n in range(len(names))]
        return [
            (each.rpartition(".")[2], self.names[each])
            for each in whole
            if len(each) > len(part) or self.parts[name].site == "other"
        ]

    def _owner(self, name: str) -> nn.Module:
        """The module whose code calls a convolution: the first above that is no list."""
        above = (self.names[each] for each in [*upwards(name)][1:])
        return next((each for each in above if type(each) not in _LISTS), self.names[""])

    def _is_taken_by_number(self, name: str, tower: nn.Module) -> bool:
        """Whether code would miss a norm that moves the layers of a convolution's tower up."""
        path: list[str] = []
        for above in [*upwards(name)][1:]:
            if type(self.names[above]) not in _LISTS:
                return bool(path) and takes_by_number(type(self.names[above]), path)
            if path or self.names[above] is tower:
                path.insert(0, above.rpartition(".")[2])
        return False

    def _is_extra(self, name: str) -> bool:
        """Whether a convolution is of a level above the laterals of a pyramid."""
        match = re.fullmatch(r"(.*?)\.?(\w+)\.(\d+)(\.conv)?", name)
        if match is None or match[2] == "lateral_convs":
            return False
        laterals = getattr(self.names.get(match[1]), "lateral_convs", None)
        return isinstance(laterals, nn.ModuleList) and int(match[3]) >= len(laterals)

    def _is_gate(self, name: str, conv: Layer, above: list[tuple[str, nn.Module]]) -> bool:
        if conv in self.gated:
            return True
        for attribute, module in above:
            if _GATE_NAMES.fullmatch(attribute) or _GATE_CLASSES.fullmatch(type(module).__name__):
                return True
            if isinstance(module, nn.Sequential) and any(map(_gates_or_pools, module)):
                return True
        return False

    def _is_dynamic(self, name: str, conv: Layer, above: list[tuple[str, nn.Module]]) -> bool:
        own_code = library_of(type(conv).forward) not in ("torch", "detectron2", "mmcv", "gn_det")
        return (own_code and bool(_DYNAMIC_CLASSES.fullmatch(type(conv).__name__))) or any(
            set(re.split(r"[_\d]+", attribute)) & _DYNAMIC_NAMES for attribute, _ in above
        )


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    return (part for part in module.modules() if not [*part.children()])


def _gates_or_pools(layer: nn.Module) -> bool:
    if "pool" in type(layer).__name__.lower():
        return getattr(layer, "output_size", None) in (1, (1, 1))
    return isinstance(layer, (nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d)) or (
        library_of(type(layer)) != "torch" and not [*layer.children()] and is_gate(layer)
    )


def _is_activation(layer: object) -> bool:
    name = getattr(layer, "__name__", type(layer).__name__)
    return _ACTIVATIONS.fullmatch(name) is not None


def _activates(owner: nn.Module) -> bool:
    """Whether the code of a module, or a child, applies an activation."""
    return any(map(_is_activation, owner.children())) or any(
        _ACTIVATIONS.fullmatch(name)
        for name in names_used(type(owner))  # type: ignore[arg-type]
    )


def _behind(sequence: nn.Sequential, conv: nn.Module) -> Iterator[nn.Module | None]:
    """The layer that follows each time that a convolution stands in a sequence."""
    return (then for layer, then in pairwise(sequence._modules.values()) if layer is conv)


def _before_activation(sequence: nn.Sequential, conv: nn.Module) -> bool:
    return any(map(_is_activation, _behind(sequence, conv)))


def _before_resizing(sequence: nn.Sequential, conv: nn.Module) -> bool:
    """Whether a layer without parameters follows that is no activation, such as nn.Upsample."""
    return any(
        then is not None
        and not any(True for _ in then.parameters())
        and not isinstance(then, (nn.Identity, nn.modules.dropout._DropoutNd))
        and not _is_activation(then)
        for then in _behind(sequence, conv)
    )


def _is_tower(parent: nn.Module, conv: nn.Module) -> bool:
    """Whether a norm can be inserted behind a convolution, and the modules after it move up."""
    if not isinstance(parent, nn.Sequential):
        return False
    is_numbered = [*parent._modules] == [*map(str, range(len(parent._modules)))]
    return is_numbered and _before_activation(parent, conv)


def _norm_comes_second(module: Layer) -> bool:
    order = getattr(module, "order", ("conv", "norm", "act"))
    return order.index("conv") < order.index("norm")


def _words(name: str) -> set[str]:
    """The words in the name of a convolution: of its attribute, or of the list that holds it."""
    parts = name.split(".")
    while len(parts) > 1 and (parts[-1].isdigit() or parts[-1] == "conv"):
        parts.pop()
    return {*filter(None, re.split(r"[_\d]+", parts[-1].lower()))}


def _predicts(name: str, aside: Set[str] = frozenset()) -> bool:
    words = _words(name) - aside
    return bool(words & _PREDICTED) and not words & _OF_TOWERS
