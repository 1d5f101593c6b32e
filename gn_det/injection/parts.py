"""The parts of a detector of any library: which site a module belongs to, by where it hangs.

What an attribute is called says what a part is, whatever its class: ``neck``, ``rpn_head``,
``mask_head``. The deepest name counts. A part that is looked at alone is known by its class.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from gn_det.injection.kinds import library_of

__all__ = ["Part", "parts_of"]


class Part(NamedTuple):
    """Where a module belongs.

    Attributes:
        site: key of SITES; "other" outside of the parts that a detector has.
        name: of the module that is this part.
        open: whether norms may be added here; False where every place is known already.
    """

    site: str
    name: str
    open: bool


# The whole name of an attribute.
_ATTRIBUTES = {
    "backbone": r"\w*backbone|bottom_up|body|trunk",
    "fpn.top_block": r"top_blocks?|extra_blocks|last_level|p6_?p7|p[67]",
    "fpn": r"\w*(?<![Bb]ottle)(?<![Bb]ottle_)neck|\w*fpn",
    "rpn": r"rpn|\w*rpn_heads?|proposal_generator",
    "mask_head": r"\w*mask_?iou_head|\w*mask_(head|heads|branch|feat_head|feature_head)",
    "point_head": r"\w*point_head|coarse_head",
    "keypoint_head": r"\w*(keypoint|kpt|pose)_heads?|densepose_\w+",
    "sem_seg_head": r"\w*(sem_seg|semantic|seg|decode|auxiliary|ins_embed)_head|\w*pixel_decoder",
    "box_head": r"b?box_heads?",
    "dense_head": r"(?!_?conv_head)\w*heads?|\w+_(tower|subnet)"
    r"|(inst?|instance|cate|cls|kernel|b?box|reg)_branch",
}
# The whole name of a class.
_CLASSES = {
    "rpn": r"\w*RPN\w*Head",
    "mask_head": r"\w*Mask\w*Head|MaskBranch",
    "point_head": r"\w*Point\w*Head",
    "keypoint_head": r"\w*(Keypoint|KRCNN|Pose)\w*(Head|Decoder)",
    "sem_seg_head": r"\w*(SemSeg|Semantic|Seg|FCN|DeepLab|PSP|UPer)\w*Head|\w*PixelDecoder",
    "box_head": r"\w*(BBox|Box|FastRCNN|ConvFC)\w*Head",
    "fpn.top_block": r"\w*(LastLevel|TopBlock)\w*",
    "fpn": r"\w*(FPN|(?<!Bottle)Neck|Pyramid)\w*",
    "dense_head": r"(?!\w*Class)\w+Head",
}
# Which parts may lie in which; where none is named, in parts that are no others' alone.
_MAY_LIE_IN = {
    "backbone": ("other", "fpn"),
    "fpn": ("other", "backbone"),
    "fpn.top_block": ("other", "fpn", "backbone"),
    "rpn": ("other", "rpn"),
    "dense_head": ("other", "rpn"),
}
_REGIONS = re.compile(r"roi_?heads?", re.IGNORECASE)
# Their own classes are in the table of sites: what it does not name there has no place.
_KNOWN_LIBRARIES = {"detectron2", "torchvision", "timm"}


def parts_of(model: nn.Module, owners: Mapping[str, str]) -> dict[str, Part]:
    """The part of each module of a model, by name.

    Args:
        model: any model.
        owners: site by name of the modules whose places are known by their class.
    """
    parts: dict[str, Part] = {}
    of_regions: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        above, _, attribute = name.rpartition(".")
        part = parts[above] if name else Part("other", "", False)
        if above in of_regions or _is_of_regions(module, attribute):
            of_regions.add(name)
        if name in owners:
            part = Part(owners[name], name, False)
        elif any(True for _ in module.children()) and not _is_whole(module, attribute):
            site = _site(module, attribute, part.site, name in of_regions)
            if site is not None:
                part = Part(site, name, library_of(type(module)) not in _KNOWN_LIBRARIES)
        parts[name] = part
    return parts


def _site(module: nn.Module, attribute: str, above: str, of_regions: bool) -> str | None:
    """The site that an attribute stands for, or a class where the name tells nothing."""
    by_name = _match(_ATTRIBUTES, attribute)
    by_class = _match(_CLASSES, type(module).__name__)
    site = by_name or (by_class if above == "other" else None)
    if site is None and _is_pyramid(module):
        site = "fpn"
    if attribute == "decoder" and of_regions:
        site = "keypoint_head"  # DensePose's
    elif site == "backbone" and by_class == "fpn":
        site = by_class  # Detectron2's FPN is what a model has as its backbone
    elif site == "dense_head" and above == "rpn" and attribute == "head":
        site = above
    elif site in ("box_head", "dense_head"):
        # mmdetection has box heads and dense heads at bbox_head.
        if of_regions or attribute == "box_head":
            site = by_class if by_class not in (None, "dense_head") else "box_head"
        else:
            site = "box_head" if by_class == "box_head" else "dense_head"
    return site if site and above in _MAY_LIE_IN.get(site, (above,)) else None


def _is_pyramid(module: nn.Module) -> bool:
    """Whether a module has convolutions for the levels it takes, and others for those it gives."""
    names = [name for name, _ in module.named_children()]
    return any("lateral" in name for name in names) and any("output" in name for name in names)


def _match(forms: Mapping[str, str], name: str) -> str | None:
    return next((site for site, form in forms.items() if re.fullmatch(form, name)), None)


def _is_of_regions(module: nn.Module, attribute: str) -> bool:
    return any(_REGIONS.search(name) for name in (attribute, type(module).__name__))


def _is_whole(module: nn.Module, attribute: str) -> bool:
    """Whether a module has parts rather than being one, as a detector or a U-Net has."""
    children = {name for name, _ in module.named_children()}
    has_parts = "backbone" in children or {"encoder", "decoder"} <= children
    return has_parts or _is_of_regions(module, attribute)
