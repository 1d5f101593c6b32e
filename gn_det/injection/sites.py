"""Sites: the parts of a detector that have norms or could have them, and where in their modules.

Detectron2's and torchvision's parts are known by the class that owns them, subclasses included.
Those of other classes are found by where they hang in the model, and their norms by type.
"""

from __future__ import annotations

import dis
import functools
import inspect
import re
import string
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple

from torch import nn

from gn_det.injection.kinds import (
    Layer,
    is_a,
    is_conv,
    is_norm,
    library_of,
    num_channels,
    type_name,
)

__all__ = [
    "DEFAULT_SITES",
    "SITES",
    "Site",
    "Slot",
    "find_by_type",
    "find_owners",
    "reads_statistics",
    "sites_of_owners",
]


class Slot(NamedTuple):
    """A place for a norm.

    Attributes:
        site: key of SITES.
        parent: the convolution itself, or whoever holds convolution and norm.
        conv: the convolution before it; None where none is known.
        norm: what is there; None if nothing.
        known: whether the class of the part tells of it; otherwise its place in the model does.
    """

    site: str
    parent: Layer
    conv: Layer
    norm: Layer
    known: bool = True

    @property
    def is_default(self) -> bool:
        """Whether "default" means this place: its site, or a norm wherever it was found."""
        return self.site in DEFAULT_SITES or (self.norm is not None and not self.known)


Place = tuple[Layer, Layer, Layer]  # parent, conv, norm


class Site(NamedTuple):
    """A part of a detector.

    Attributes:
        owners: by name of a class, the function that yields its places for norms.
        drops_bias: whether a convolution that gains a norm loses its bias, as in Detectron2's own
            GN models.
        hint: what to do where an owner has no place for a norm.
    """

    owners: dict[str, Callable[[Layer], Iterator[Place]]]
    drops_bias: bool = False
    hint: str = ""


_CHANNELS_FIRST_LAYER_NORM = "detectron2.layers.batch_norm.LayerNorm"
# The second is the name before Detectron2 0.2.
_BLOCKS = (
    "detectron2.layers.blocks.CNNBlockBase",
    "detectron2.modeling.backbone.resnet.ResNetBlockBase",
)
_CONV_OF_BLOCK = re.compile(r"conv\d+(_\d+)?|shortcut")
_NO_DIGITS = string.ascii_letters + "_"


def _own(*convs: Layer) -> Iterator[Place]:
    """Convolutions that hold their norm, or are going to."""
    for conv in convs:
        norm = getattr(conv, "norm", None)
        if norm is None or type(norm) is nn.Identity:
            yield conv, conv, None
        elif is_norm(norm) or is_a(norm, _CHANNELS_FIRST_LAYER_NORM):
            yield conv, conv, norm


def _all_own(module: nn.Module) -> Iterator[Place]:
    """Every convolution below that has an attribute for its norm."""
    for conv in module.modules():
        if hasattr(conv, "norm") and is_conv(conv):
            yield from _own(conv)


def _residual(module: nn.Module) -> Iterator[Place]:
    """The convolutions of stem and blocks, and whatever else below holds a norm.

    Blocks of somebody's own have other convolutions too, as those of a gate, and may have their
    norms beside the convolutions: a norm is added at the names that Detectron2's blocks use alone.
    """
    for name, conv in module.named_modules():
        if hasattr(conv, "norm") and is_conv(conv):
            above, _, own_name = name.rpartition(".")
            block = module.get_submodule(above)
            gains = (
                is_a(block, *_BLOCKS)
                and _CONV_OF_BLOCK.fullmatch(own_name)
                and not any(map(is_norm, block.children()))
            )
            yield from (place for place in _own(conv) if gains or place[2] is not None)


def _rpn(conv: nn.Module) -> Iterator[Place]:
    """The convolutions before the two predictors; up to Detectron2 0.4 a plain nn.Conv2d."""
    yield from [(conv, conv, None)] if type(conv) is nn.Conv2d else _all_own(conv)


def _in_sequentials(module: nn.Module) -> Iterator[Place]:
    """Norms behind the convolutions of every nn.Sequential below, or the places for them."""
    for sequence in module.modules():
        if isinstance(sequence, nn.Sequential):
            layers = [*sequence, None]
            for layer, following in pairwise(layers):
                if isinstance(layer, nn.modules.conv._ConvNd) and not hasattr(layer, "norm"):
                    yield sequence, layer, following if is_norm(following) else None


def find_by_type(module: nn.Module) -> Iterator[Place]:
    """Every BN, SyncBN, FrozenBN and GN below."""
    in_lists = dict(_pairs_in_lists(module))
    # Blocks may have what follows a convolution in a module of its own, as monai's do.
    behind_convs = {
        then: conv
        for sequence in module.modules()
        if isinstance(sequence, nn.Sequential)
        for conv, then in pairwise(sequence)
        if is_conv(conv)
    }
    for parent in module.modules():
        if is_norm(parent):
            continue  # a list of BN layers that counts as one
        # A convolution may hold its norm itself, as Detectron2's do.
        holds = getattr(parent, "weight", None) is not None
        before = parent if holds else behind_convs.get(parent)
        numbered: dict[str, nn.Module] = {}  # by the end of their names: conv2, bn2
        flat = False
        for name, child in parent.named_children():
            number = name.lstrip(_NO_DIGITS)
            if is_norm(child):
                behind = in_lists.get(child, numbered.get(number, before))
                vectors = flat and isinstance(child, nn.BatchNorm1d)
                if vectors or _is_of_vectors(child, behind) or reads_statistics(type(parent)):  # type: ignore[arg-type]
                    continue
                convs = (in_lists.get(child), numbered.get(number), before)
                found = (_conv_of(conv, num_channels(child)) for conv in convs)
                yield parent, next(filter(None, found), None), child
            elif isinstance(child, nn.Flatten) and (child.start_dim, child.end_dim) == (1, -1):
                flat = True
            elif any(True for _ in child.parameters()):
                before, flat = child, False
                if number and is_conv(child):
                    numbered[number] = child


def _is_of_vectors(norm: nn.Module, behind: Layer) -> bool:
    """Whether a channel is one value, of which GN would return its β: behind a linear layer.

    nn.BatchNorm1d behind a convolution of 2D maps has vectors too, of a pooling that forward calls.
    """
    if behind is None or type(norm).__name__.endswith(("2d", "3d")):
        return False
    if not isinstance(norm, nn.BatchNorm1d):
        return isinstance(_last(behind), nn.Linear)
    layers = [m for m in behind.modules() if is_conv(m) or isinstance(m, nn.Linear)]
    size = getattr(layers[-1], "kernel_size", ()) if layers else 1
    return isinstance(size, tuple) and len(size) != 1


@functools.cache
def reads_statistics(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class reads the running statistics of its norms, which GN lacks."""
    if type_name(kind).startswith("torch.ao."):  # convolutions that are trained to be quantized
        return True
    methods, seen = [kind.forward], {"forward"}
    while methods:
        method = inspect.unwrap(methods.pop())
        if not inspect.isfunction(method):
            continue
        code = [*dis.get_instructions(method)]
        names = [each.argval for each in code if each.opname == "LOAD_GLOBAL"]
        helpers = (method.__globals__.get(name) for name in names)
        if any(map(_has_statistics, [method, *filter(_is_theirs, helpers)])):
            return True
        owner = method.__code__.co_varnames[:1]  # self
        called = {
            then.argval
            for one, then in pairwise(code)
            if one.argval in owner and then.opname in ("LOAD_ATTR", "LOAD_METHOD")
        } - seen
        seen |= called
        methods += [getattr(kind, name) for name in called if hasattr(kind, name)]
    return False


def _has_statistics(function: Any) -> bool:
    code = dis.get_instructions(function)
    return any(each.argval in ("running_mean", "running_var") for each in code)


def _is_theirs(helper: Any) -> bool:
    return inspect.isfunction(helper) and library_of(helper) != "torch"


def _pairs_in_lists(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Yields (norm, layer) where a list of norms comes after as long a list of theirs."""
    for parent in module.modules():
        lists = [child for child in parent.children() if isinstance(child, nn.ModuleList)]
        for layers, norms in pairwise(lists):
            fit = len(layers) == len(norms) and all(map(is_norm, norms))
            if fit and all(is_conv(layer) or isinstance(layer, nn.Linear) for layer in layers):
                yield from zip(norms, layers, strict=True)


def _last(layer: Layer) -> Layer:
    """The layer, or the last one with parameters where it is an nn.Sequential."""
    while isinstance(layer, nn.Sequential):
        with_parameters = [part for part in layer if any(True for _ in part.parameters())]
        layer = with_parameters[-1] if with_parameters else None
    return layer


def _conv_of(layer: Layer, channels: int) -> Layer:
    """The convolution with so many output channels that a layer is, ends in or wraps, or None."""
    layer = _last(layer)
    if layer is None or is_norm(layer):
        return None
    if getattr(layer, "weight", None) is not None:
        return layer if getattr(layer, "out_channels", None) == channels else None
    # Beside the convolution, a deformable one holds another that predicts sampling points.
    fitting = [m for m in layer.modules() if is_conv(m) and m.out_channels == channels]
    return fitting[0] if len(fitting) == 1 else None


def _simple_pyramid(pyramid: Layer) -> Iterator[Place]:
    for stage in pyramid.stages:
        for layer, following in pairwise([*stage, None]):
            if hasattr(layer, "norm"):
                yield from _own(layer)
            elif is_norm(following) or is_a(following, _CHANNELS_FIRST_LAYER_NORM):
                yield stage, layer, following


_MODELING = "detectron2.modeling"
_POINT_REND = "detectron2.projects.point_rend"
_DEEPLAB = "detectron2.projects.deeplab.semantic_seg"
_TORCHVISION = "torchvision.models.detection"

SITES = {
    "backbone": Site(
        {
            f"{_MODELING}.backbone.resnet.ResNet": _residual,
            f"{_MODELING}.backbone.regnet.AnyNet": find_by_type,
            "gn_det.modeling.timm_backbone.backbone.TimmBackbone": find_by_type,
            f"{_MODELING}.roi_heads.roi_heads.Res5ROIHeads": lambda heads: _residual(heads.res5),
            "torchvision.models._utils.IntermediateLayerGetter": find_by_type,
        },
        drops_bias=True,
    ),
    "fpn": Site(
        {
            f"{_MODELING}.backbone.fpn.FPN": lambda fpn: _own(
                *fpn.lateral_convs, *fpn.output_convs
            ),
            f"{_MODELING}.backbone.vit.SimpleFeaturePyramid": _simple_pyramid,
            "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": lambda fpn: chain(
                _in_sequentials(fpn.inner_blocks), _in_sequentials(fpn.layer_blocks)
            ),
        },
        drops_bias=True,
    ),
    "fpn.top_block": Site(
        {
            f"{_MODELING}.backbone.fpn.LastLevelP6P7": lambda block: _own(block.p6, block.p7),
            "torchvision.ops.feature_pyramid_network.LastLevelP6P7": lambda block: _own(
                block.p6, block.p7
            ),
        },
    ),
    "rpn": Site(
        {
            f"{_MODELING}.proposal_generator.rpn.StandardRPNHead": lambda head: _rpn(head.conv),
            f"{_TORCHVISION}.rpn.RPNHead": lambda head: _in_sequentials(head.conv),
        },
    ),
    "box_head": Site(
        {
            f"{_MODELING}.roi_heads.box_head.FastRCNNConvFCHead": lambda head: _own(
                *head.conv_norm_relus
            ),
            f"{_TORCHVISION}.faster_rcnn.FastRCNNConvFCHead": _in_sequentials,
            f"{_TORCHVISION}.faster_rcnn.TwoMLPHead": lambda head: iter(()),
        },
        drops_bias=True,
        hint="it has fully connected layers only; set MODEL.ROI_BOX_HEAD.NUM_CONV, as to 4 with "
        "NUM_FC 1 (conv_dims, or torchvision's FastRCNNConvFCHead)",
    ),
    "mask_head": Site(
        {
            f"{_MODELING}.roi_heads.mask_head.MaskRCNNConvUpsampleHead": lambda head: _own(
                *head.conv_norm_relus
            ),
            f"{_TORCHVISION}.mask_rcnn.MaskRCNNHeads": _in_sequentials,
        },
        drops_bias=True,
        hint="it has no convolution before its deconvolution; set MODEL.ROI_MASK_HEAD.NUM_CONV, as "
        "to 4, or name mask_head.deconv",
    ),
    "mask_head.deconv": Site(
        {
            f"{_MODELING}.roi_heads.mask_head.MaskRCNNConvUpsampleHead": lambda head: _own(
                head.deconv
            ),
            f"{_TORCHVISION}.mask_rcnn.MaskRCNNPredictor": lambda head: _own(head.conv5_mask),
        },
    ),
    "keypoint_head": Site(
        {
            f"{_MODELING}.roi_heads.keypoint_head.KRCNNConvDeconvUpsampleHead": lambda head: _own(
                *(
                    conv
                    for name, conv in head.named_children()
                    if re.fullmatch(r"conv_fcn\d+", name)
                )
            ),
            f"{_TORCHVISION}.keypoint_rcnn.KeypointRCNNHeads": lambda head: _own(
                *(conv for conv in head if isinstance(conv, nn.Conv2d))
            ),
        },
    ),
    "sem_seg_head": Site(
        {
            f"{_MODELING}.meta_arch.semantic_seg.SemSegFPNHead": lambda head: chain.from_iterable(
                _all_own(scale) for scale in head.scale_heads
            ),
            f"{_DEEPLAB}.DeepLabV3Head": find_by_type,
            f"{_DEEPLAB}.DeepLabV3PlusHead": find_by_type,
            "detectron2.projects.panoptic_deeplab.panoptic_seg.PanopticDeepLabInsEmbedHead": (
                find_by_type
            ),
        },
        drops_bias=True,
    ),
    "dense_head": Site(
        {
            f"{_MODELING}.meta_arch.retinanet.RetinaNetHead": lambda head: chain(
                _in_sequentials(head.cls_subnet), _in_sequentials(head.bbox_subnet)
            ),
            f"{_TORCHVISION}.retinanet.RetinaNetClassificationHead": _in_sequentials,
            f"{_TORCHVISION}.retinanet.RetinaNetRegressionHead": _in_sequentials,
            f"{_TORCHVISION}.fcos.FCOSClassificationHead": _in_sequentials,
            f"{_TORCHVISION}.fcos.FCOSRegressionHead": _in_sequentials,
        },
    ),
    "point_head": Site(
        {
            f"{_POINT_REND}.mask_head.ConvFCHead": lambda head: _own(*head.conv_layers),
            f"{_POINT_REND}.point_head.StandardPointHead": lambda head: _own(*head.fc_layers),
        },
    ),
    # What is a norm by its type, and in none of the parts above.
    "other": Site({}),
}

# Those that Detectron2's NORM keys reach, and norms of heads that are not Detectron2's.
DEFAULT_SITES = (
    "backbone",
    "fpn",
    "box_head",
    "mask_head",
    "sem_seg_head",
    "dense_head",
    "other",
)


def find_owners(model: nn.Module, site: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Yields (name, module, owner) for the modules of a class that owns a site, in module order."""
    owners = SITES[site].owners
    for name, module in model.named_modules():
        for kind in type(module).__mro__:
            if type_name(kind) in owners:
                yield name, module, type_name(kind)
                break


def sites_of_owners(model: nn.Module) -> dict[str, str]:
    """The site of each module whose class is known, by name."""
    return {name: site for site in reversed(SITES) for name, _, _ in find_owners(model, site)}
