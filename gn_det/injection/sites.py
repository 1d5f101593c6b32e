"""Sites: the parts of a detector that have norms or could have them, and where in their modules.

Parts are known by the class that owns them, subclasses included, and classes by their names, so
that no library needs to be installed for another's models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any, NamedTuple

from torch import nn

__all__ = [
    "DEFAULT_SITES",
    "SITES",
    "Layer",
    "Site",
    "Slot",
    "find_owners",
    "find_slots",
    "num_channels",
    "type_name",
]


# A convolution, norm or head of any library, or None: nn.Module declares none of their attributes.
Layer = Any


class Slot(NamedTuple):
    """A place for a norm.

    Attributes:
        site: key of SITES.
        parent: the convolution itself, or whoever holds convolution and norm.
        conv: the convolution before it; None where none is known.
        norm: what is there; None if nothing.
    """

    site: str
    parent: Layer
    conv: Layer
    norm: Layer


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


# BN and GN of PyTorch are found by isinstance, where forward comes from one of these.
_LIBRARIES = {"detectron2", "fvcore", "gn_det", "mmcv", "mmengine", "timm", "torch", "torchvision"}
_FROZEN_AND_CYCLED = (
    "detectron2.layers.batch_norm.FrozenBatchNorm2d",
    "detectron2.layers.batch_norm.CycleBatchNormList",
    "torchvision.ops.misc.FrozenBatchNorm2d",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
)
_CHANNELS_FIRST_LAYER_NORM = "detectron2.layers.batch_norm.LayerNorm"


def type_name(kind: type) -> str:
    """``package.module.Class``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_a(module: nn.Module, *names: str) -> bool:
    """isinstance by the name of the class."""
    return any(type_name(kind) in names for kind in type(module).__mro__)


def _is_norm(module: nn.Module | None) -> bool:
    """Whether a module is a BN, SyncBN, FrozenBN or GN layer that FusedGroupNorm can replace."""
    if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
        # A class of the user's own may compute something else.
        return type(module).forward.__module__.split(".")[0] in _LIBRARIES
    return module is not None and _is_a(module, *_FROZEN_AND_CYCLED)


def num_channels(norm: Layer) -> int:
    """C of a norm of any kind."""
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return getattr(norm, name)
    return len(norm.weight)


def _own(*convs: Layer) -> Iterator[Place]:
    """Convolutions that hold their norm, or are going to."""
    for conv in convs:
        norm = getattr(conv, "norm", None)
        if norm is None or type(norm) is nn.Identity:
            yield conv, conv, None
        elif _is_norm(norm) or _is_a(norm, _CHANNELS_FIRST_LAYER_NORM):
            yield conv, conv, norm


def _all_own(module: nn.Module) -> Iterator[Place]:
    """Every convolution below that has an attribute for its norm."""
    for name, conv in module.named_modules():
        is_conv = hasattr(conv, "norm") and hasattr(conv, "out_channels")
        # conv2_offset predicts the sampling points of a deformable convolution.
        if is_conv and not name.endswith("conv2_offset"):
            yield from _own(conv)


def _in_sequentials(module: nn.Module) -> Iterator[Place]:
    """Norms behind the convolutions of every nn.Sequential below, or the places for them."""
    for sequence in module.modules():
        if isinstance(sequence, nn.Sequential):
            layers = [*sequence, None]
            for layer, following in pairwise(layers):
                if isinstance(layer, nn.modules.conv._ConvNd) and not hasattr(layer, "norm"):
                    yield sequence, layer, following if _is_norm(following) else None


def _by_type(module: nn.Module) -> Iterator[Place]:
    """Every BN, SyncBN, FrozenBN and GN below."""
    for parent in module.modules():
        if _is_norm(parent):
            continue  # a list of BN layers that counts as one
        # A convolution may hold its norm itself, as Detectron2's do.
        before = parent if getattr(parent, "weight", None) is not None else None
        for child in parent.children():
            # Behind a linear layer, a channel is one value: GN would return its β.
            if _is_norm(child) and not isinstance(before, nn.Linear):
                fits = getattr(before, "out_channels", None) == num_channels(child)
                yield parent, before if fits else None, child
            else:
                layers = [*child] if type(child) is nn.Sequential else [child]
                weighted = [e for e in layers if getattr(e, "weight", None) is not None]
                before = weighted[-1] if weighted else before


def _simple_pyramid(pyramid: Layer) -> Iterator[Place]:
    for stage in pyramid.stages:
        for layer, following in pairwise([*stage, None]):
            if hasattr(layer, "norm"):
                yield from _own(layer)
            elif _is_norm(following) or _is_a(following, _CHANNELS_FIRST_LAYER_NORM):
                yield stage, layer, following


_MODELING = "detectron2.modeling"
_POINT_REND = "detectron2.projects.point_rend"
_DEEPLAB = "detectron2.projects.deeplab.semantic_seg"
_TORCHVISION = "torchvision.models.detection"

SITES = {
    "backbone": Site(
        {
            f"{_MODELING}.backbone.resnet.ResNet": _all_own,
            f"{_MODELING}.backbone.regnet.AnyNet": _by_type,
            "gn_det.modeling.timm_backbone.TimmBackbone": _by_type,
            f"{_MODELING}.roi_heads.roi_heads.Res5ROIHeads": lambda heads: _all_own(heads.res5),
            "torchvision.models._utils.IntermediateLayerGetter": _by_type,
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
            f"{_MODELING}.proposal_generator.rpn.StandardRPNHead": lambda head: _all_own(head.conv),
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
                *(conv for name, conv in head.named_children() if hasattr(conv, "norm"))
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
            f"{_DEEPLAB}.DeepLabV3Head": _by_type,
            f"{_DEEPLAB}.DeepLabV3PlusHead": _by_type,
            "detectron2.projects.panoptic_deeplab.panoptic_seg.PanopticDeepLabInsEmbedHead": (
                _by_type
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
    "other": Site({"torch.nn.modules.module.Module": _by_type}),
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


def find_slots(model: nn.Module) -> list[Slot]:
    """Every place for a norm in a model, each once and at the first site that has it."""
    found: set[nn.Module] = set()
    slots = []
    for site, (owners, *_) in SITES.items():
        for _, owner, kind in [*find_owners(model, site)][: 1 if site == "other" else None]:
            try:
                places = [*owners[kind](owner)]
            except AttributeError:  # a subclass that was built without the parts of its base
                continue
            for parent, conv, norm in places:
                key = conv if norm is None else norm
                if key not in found:
                    found |= {key} if norm is None else set(norm.modules())
                    slots.append(Slot(site, parent, conv, norm))
    return slots
