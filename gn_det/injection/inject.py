"""Inject: put FusedGroupNorm into a built model, in place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.errors import InputError
from gn_det.injection.sites import (
    DEFAULT_SITES,
    SITES,
    Layer,
    Slot,
    find_owners,
    find_slots,
    num_channels,
)
from gn_det.injection.standardize import check_standardizable, standardize
from gn_det.layers import (
    FusedGroupNorm,
    FusedGroupNormAct,
    Groups,
    give_norm,
    insert_norm,
)
from gn_det.utils import nearest

__all__ = ["choose_sites", "inject", "place_norms"]


def inject(
    model: nn.Module,
    sites: str | Sequence[str] = "default",
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    weight_standardization: bool = False,
) -> nn.Module:
    """Replace the norms at sites of a model by FusedGroupNorm, and add them where there is none.

    A BN, SyncBN, FrozenBN or GN layer is replaced, and its γ and β are carried over. A convolution
    without a norm gets one. Its bias is removed where Detectron2's own GN models have none
    (backbone, FPN, box, mask and semantic heads), so that state-dict keys match theirs. RetinaNet's
    and FCOS's towers still load weights that were saved without norms.

    A new norm is frozen if the norm that it replaces was frozen. Where that was FrozenBN, or where
    there was none, it is frozen if its convolution is (where none is known, if all beside it is),
    so FREEZE_AT keeps its meaning. Hooks, and the dropout and activation of timm's norms, are kept.
    Norms of classes with a forward of their own, and norms behind linear layers, stay as they are.
    Subclasses of Detectron2's and torchvision's modules have the sites of their base.

    Call this before you build the optimizer and DistributedDataParallel, because γ and β are new
    parameters.

    Sites:
        backbone: the convolutions of a ResNet or RegNet, including the res5 stage of C4 heads.
        fpn: the lateral and output convolutions of FPN or SimpleFeaturePyramid.
        fpn.top_block: the convolutions P6 and P7 above FPN in RetinaNet and FCOS.
        rpn: the shared convolutions of the RPN head.
        box_head: the convolutions of the box head.
        mask_head: the convolutions of the mask head before its deconvolution.
        mask_head.deconv: the deconvolution of the mask head.
        keypoint_head: the convolutions of the keypoint head.
        sem_seg_head: the convolutions of SemSegFPNHead and of DeepLab's heads.
        dense_head: the classification and box towers of RetinaNet and FCOS.
        point_head: PointRend's coarse mask head and point head.
        other: every norm that is in none of the parts above.

    Args:
        model: a Detectron2 or torchvision detector, any other nn.Module, or a part of one. It is
            modified in place.
        sites: one or several of the names above, of "default" and of "ALL". "default" means
            backbone, fpn, box_head, mask_head, sem_seg_head, dense_head and other: the sites that
            Detectron2's NORM keys reach, and other norms. "ALL" means every site. These two skip
            sites where there is nothing to normalize; a site that you name must have something.
        num_groups: G of every norm. Where the channels are not a multiple of it, the largest
            divisor of the channels below it is taken. Default: a GN layer keeps its own, others get
            32.
        channels_per_group: the other way to choose G, instead of num_groups: channels in each
            group, or the largest divisor of the channels below.
        weight_standardization: whether the convolutions before these norms also standardize their
            weight (Qiao et al. 2019, arXiv 1903.10520, section 2). Only PyTorch's and Detectron2's
            own convolution classes can; audit lists the others. State-dict keys stay, but old
            weights then compute something else.

    Returns:
        model.

    Raises:
        InputError: a site is unknown or has nothing to normalize, num_groups and channels_per_group
            are both given or below 1, no convolution can standardize its weight, or the model
            contains a DistributedDataParallel. The model is then unchanged.

    Example::

        from torchvision.models.detection import maskrcnn_resnet50_fpn

        detector = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        gn_det.inject(detector, ["backbone", "fpn", "mask_head"], channels_per_group=16)
    """
    groups = Groups(num_groups, channels_per_group)
    slots = find_slots(model)
    chosen = choose_sites(model, slots, [sites] if isinstance(sites, str) else sites)
    slots = [slot for slot in slots if slot.site in chosen]
    place_norms(model, slots, groups, weight_standardization)
    return model


def choose_sites(model: nn.Module, slots: Iterable[Slot], sites: Sequence[str]) -> set[str]:
    """The sites that are meant, each checked to have a slot."""
    several = {"default": DEFAULT_SITES, "ALL": tuple(SITES)}
    there = Counter(slot.site for slot in slots)
    chosen: set[str] = set()
    for site in sites:
        if site in several:
            chosen |= there.keys() & set(several[site])
        elif site not in SITES:
            known = [*several, *SITES]
            raise InputError(
                f"no site {site!r}{nearest(site, known)}; there are {', '.join(known)}"
            )
        elif site not in there:
            raise InputError(f"{_nothing_at(model, site)}. {_what_is_there(model, there)}")
        else:
            chosen.add(site)
    if not chosen:
        raise InputError(
            f"nothing to normalize at {', '.join(sites) or 'no sites'}. "
            f"{_what_is_there(model, there)}"
        )
    return chosen


def place_norms(
    model: nn.Module, slots: Sequence[Slot], groups: Groups, weight_standardization: bool = False
) -> None:
    """Put a FusedGroupNorm into each slot of a model, in place, or raise and change nothing.

    Raises:
        InputError: no convolution can standardize its weight, or the model is distributed.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise InputError("inject before DistributedDataParallel, which would not see the new norms")
    if weight_standardization:
        check_standardizable(slots)
    norms = [_norm_for(slot, groups) for slot in slots]
    holders = defaultdict(list)  # several, where modules share a norm
    for parent in model.modules():
        for child in parent.children():
            holders[child].append(parent)
    for slot, norm in zip(slots, norms, strict=True):
        if slot.norm is None:
            _add(slot, norm)
        else:
            for holder in holders[slot.norm]:
                _replace(holder, slot.norm, norm)
        if weight_standardization:
            standardize(slot.conv)


def _nothing_at(model: nn.Module, site: str) -> str:
    found = [
        f"{name or 'the model'} ({type(m).__name__})" for name, m, _ in find_owners(model, site)
    ]
    if not found or site == "other":
        return f"site {site}: {type(model).__name__} has none"
    hint = SITES[site].hint and f": {SITES[site].hint}"
    return f"site {site}: {', '.join(found)} has nothing to normalize{hint}"


def _what_is_there(model: nn.Module, there: Counter[str]) -> str:
    if there:
        listed = ", ".join(f"{site} {count}" for site, count in there.items())
        return f"The places for norms in {type(model).__name__}: {listed}"
    empty = [
        _nothing_at(model, site)
        for site in SITES
        if site != "other" and any(find_owners(model, site))
    ]
    return "; ".join([f"{type(model).__name__} has no place for a norm", *empty])


def _norm_for(slot: Slot, groups: Groups) -> FusedGroupNorm:
    old, conv = slot.norm, slot.conv
    channels = conv.out_channels if old is None else num_channels(old)
    keeps_groups = isinstance(old, nn.GroupNorm) and groups.is_default
    tensors = chain.from_iterable(
        (*module.parameters(), *module.buffers()) for module in (conv, old) if module is not None
    )
    like = next(tensors, torch.empty(0))
    norm = FusedGroupNorm(
        channels,
        old.num_groups if keeps_groups else groups.of(channels),
        old.eps if isinstance(old, nn.GroupNorm) else 1e-5,
        affine=old is None or old.weight is not None,
        device=like.device,
        dtype=like.dtype,
    )
    if old is None:
        return norm.requires_grad_(conv.weight.requires_grad).train(conv.training)
    _carry_over(old, norm)
    # FrozenBN's are buffers, which tell nothing of whether a layer is frozen.
    source = old if isinstance(old.weight, nn.Parameter) else conv
    if source is None:  # as where the norm comes first
        beside = [*slot.parent.parameters()]
        trains = not beside or any(parameter.requires_grad for parameter in beside)
    else:
        trains = source.weight is None or source.weight.requires_grad
    return norm.requires_grad_(trains).train(old.training)


def _carry_over(old: Layer, norm: FusedGroupNorm) -> None:
    """Give a norm the parameters of the one that it replaces, its hooks, and what it also did."""
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(old.weight)
            norm.bias.copy_(old.bias)
    for name, value in vars(old).items():
        if name.startswith(("_forward_", "_backward_", "_is_full_backward_hook")):  # their hooks
            setattr(norm, name, value)
    if isinstance(old, FusedGroupNorm):
        norm.activation = old.activation
    drop, act = getattr(old, "drop", None), getattr(old, "act", None)
    if type(act) is nn.ReLU and isinstance(drop, (nn.Identity, type(None))):
        norm.activation = "relu"
    elif act is not None:
        norm.__class__ = FusedGroupNormAct
        norm.drop, norm.act = drop or nn.Identity(), act


def _replace(holder: nn.Module, old: nn.Module, norm: FusedGroupNorm) -> None:
    for name, child in [*holder._modules.items()]:
        if child is old:
            setattr(holder, name, norm)


def _add(slot: Slot, norm: FusedGroupNorm) -> None:
    if slot.parent is slot.conv:
        give_norm(slot.conv, norm)
    else:
        insert_norm(slot.parent, slot.conv, norm)
    if SITES[slot.site].drops_bias:
        slot.conv.bias = None
