"""Inject: put FusedGroupNorm into a built model, in place."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from itertools import chain

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.errors import InputError
from gn_det.injection.choose import Which, choose_slots
from gn_det.injection.exchange import check_exchangeable, exchange
from gn_det.injection.kinds import Layer, num_channels, upwards
from gn_det.injection.places import find_places
from gn_det.injection.sites import SITES, Slot
from gn_det.injection.standardize import check_standardizable, standardize
from gn_det.injection.without_norm import is_conv_module
from gn_det.layers import (
    FusedGroupNorm,
    FusedGroupNormAct,
    Groups,
    give_norm,
    insert_norm,
)
from gn_det.text import shortened

__all__ = ["has_bns_values", "inject", "place_norms"]

_logger = logging.getLogger(__name__)


def inject(
    model: nn.Module,
    sites: Which | Sequence[Which] = "default",
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    min_channels_per_group: int = 1,
    weight_standardization: bool = False,
) -> nn.Module:
    """Replace the norms at sites of a model by FusedGroupNorm, and add them where there is none.

    A BN, SyncBN, FrozenBN or GN layer is replaced, and its γ and β are carried over. A convolution
    without a norm gets one. Its bias is removed where Detectron2's own GN models have none
    (backbone, FPN, box, mask and semantic heads), so that state-dict keys match theirs. RetinaNet's
    and FCOS's towers still load weights that were saved without norms.

    A new norm is frozen if the norm that it replaces was frozen. Where that was FrozenBN, or where
    there was none, it is frozen if its convolution is, so FREEZE_AT keeps its meaning. Hooks, and
    the dropout and activation of timm's norms, are kept.

    These norms stay as they are: those of classes with a forward of their own, behind linear
    layers, in gates behind global pooling, and those that are pruned, parametrized or read by the
    code around them. audit lists each, and each convolution without a norm, with the reason.

    Subclasses of Detectron2's and torchvision's modules have the sites of their base. In other
    classes, a part is known by its name in the model (backbone, neck, rpn_head, mask_head). A
    convolution there gains a norm where an activation follows it, or in a pyramid; predictors and
    convolutions that predict weights or sampling points of others gain none.

    Call this before you build DistributedDataParallel. γ and β of BN and GN stay the same
    parameters, which an optimizer that was built before still trains; those in the place of
    FrozenBN and behind convolutions without a norm are new, and are named in the log.

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
        sites: one or several of the names above, of "default" and of "ALL"; also names of modules,
            with * and ?, or a function of the name and the convolution or norm. The name of a part
            means all places in it. The whole name of a convolution, or a function that returns
            True for it, gives it a norm wherever it is. "default" means
            backbone, fpn, box_head, mask_head, sem_seg_head, dense_head and other: the sites that
            Detectron2's NORM keys reach, and other norms. "ALL" means every site. These two skip
            sites where there is nothing to normalize; a site that you name must have something.
        num_groups: G of every norm. Where the channels are not a multiple of it, the largest
            divisor of the channels below it is taken. Default: a GN layer keeps its own, others get
            32.
        channels_per_group: the other way to choose G, instead of num_groups: channels in each
            group, or the largest divisor of the channels below.
        min_channels_per_group: the fewest channels of a group, for layers so narrow that 32 groups
            would be instance norm. Default: 1.
        weight_standardization: whether the convolutions before these norms also standardize their
            weight (Qiao et al. 2019, arXiv 1903.10520, section 2). Only PyTorch's and Detectron2's
            own convolution classes can; audit lists the others. State-dict keys stay, but old
            weights then compute something else.

    Returns:
        model.

    Raises:
        InputError: a site is unknown or has nothing to normalize, num_groups and channels_per_group
            are both given, or a number is below 1, no convolution can standardize its weight, a
            function of the model holds a norm for itself, or the model contains a
            DistributedDataParallel. The model is then unchanged.

    Example::

        from torchvision.models.detection import maskrcnn_resnet50_fpn

        detector = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        gn_det.inject(detector, ["backbone", "fpn", "mask_head"], channels_per_group=16)
    """
    groups = Groups(num_groups, channels_per_group, min_channels_per_group)
    which = [sites] if isinstance(sites, str) or callable(sites) else sites
    slots = choose_slots(model, find_places(model), which)
    place_norms(model, slots, groups, weight_standardization)
    return model


def place_norms(
    model: nn.Module, slots: Sequence[Slot], groups: Groups, weight_standardization: bool = False
) -> None:
    """Put a FusedGroupNorm into each slot of a model, in place, or raise and change nothing.

    Raises:
        InputError: no convolution can standardize its weight, a function of the model holds a norm
            for itself, or the model is distributed.
    """
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise InputError("inject before DistributedDataParallel, which would not see the new norms")
    if weight_standardization:
        check_standardizable(slots)
    check_exchangeable(model, {slot.norm for slot in slots} - {None})
    names = {module: name for name, module in model.named_modules()}
    with torch.inference_mode(False):  # in which parameters would never train
        norms = [_norm_for(model, names, slot, groups) for slot in slots]
    places = [*zip(slots, norms, strict=True)]
    exchange(model, {slot.norm: norm for slot, norm in places if slot.norm is not None})
    for slot, norm in places:
        if slot.norm is None:
            _add(slot, norm)
        if weight_standardization:
            standardize(slot.conv)
    names = {module: name for name, module in model.named_modules()}
    for norm in norms:
        norm.name = names[norm]
    anew = [
        norm.name
        for slot, norm in places
        if norm.affine and getattr(slot.norm, "weight", None) is not norm.weight
    ]
    if anew:
        _logger.info(
            f"{len(anew)} norms have new parameters, which an optimizer that was built before does "
            f"not train: {shortened(anew, 3)}"
        )


# Attributes of nn.Module that hold hooks.
_HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook", "_state_dict", "_load_state_dict")


def has_bns_values(norm: nn.GroupNorm) -> bool:
    """Whether γ and β are those that inject took from BN, or that weights with BN brought."""
    taken = getattr(norm, "taken_from_bn", None)
    if taken is None or norm.weight.is_meta or taken != (norm.weight._version, norm.bias._version):
        return False
    return not (norm.weight.eq(1).all() and norm.bias.eq(0).all())  # a BN that never trained


def _norm_for(
    model: nn.Module, names: dict[nn.Module, str], slot: Slot, groups: Groups
) -> FusedGroupNorm:
    old, conv = slot.norm, slot.conv
    channels = conv.out_channels if old is None else num_channels(old)
    keeps_groups = isinstance(old, nn.GroupNorm) and groups.is_default
    tensors = chain.from_iterable(
        (*module.parameters(), *module.buffers()) for module in (old, conv) if module is not None
    )
    like = next(tensors, torch.empty(0))
    norm = FusedGroupNorm(
        channels,
        old.num_groups if keeps_groups else groups.of(channels),
        old.eps if isinstance(old, nn.GroupNorm) else 1e-5,
        affine=old is None or old.weight is not None,
        bias=not isinstance(old, nn.GroupNorm) or old.bias is not None,
        device=like.device,
        dtype=like.dtype,
    )
    if old is None:
        return norm.requires_grad_(conv.weight.requires_grad).train(conv.training)
    _carry_over(old, norm)
    if norm.affine and norm.weight is not old.weight:
        # FrozenBN's are buffers, which tell nothing of whether a layer is frozen.
        norm.requires_grad_(_trains(model, names[slot.parent], conv))
    return norm.train(old.training)


def _trains(model: nn.Module, name: str, conv: Layer) -> bool:
    """Whether a convolution trains, or else what is nearest to a module: it, or who holds it."""
    if conv is not None and conv.weight is not None:
        return conv.weight.requires_grad
    for holder in upwards(name):
        parameters = [*model.get_submodule(holder).parameters()]
        if parameters:
            return any(parameter.requires_grad for parameter in parameters)
    return True


def _carry_over(old: Layer, norm: FusedGroupNorm) -> None:
    """Give a norm the parameters of the one that it replaces, its hooks, and what it also did."""
    for name in ("weight", "bias") if norm.affine else ():
        value, own = getattr(old, name), getattr(norm, name)
        if value is None:
            continue
        if value.__class__ is nn.Parameter and (value.shape, value.dtype) == (own.shape, own.dtype):
            setattr(norm, name, value)  # which an optimizer may hold
        else:
            with torch.no_grad():
                own.copy_(value)
            own.requires_grad_(value.requires_grad)
        if not isinstance(old, nn.GroupNorm):
            norm.mark_values_of_bn()
    for name, value in vars(old).items():
        if name.startswith(_HOOKS):
            setattr(norm, name, value)
            for hook in value.values() if isinstance(value, dict) else ():
                if getattr(hook, "with_module", False):
                    hook.module = weakref.ref(norm)
    if isinstance(old, FusedGroupNorm):
        norm.activation = old.activation
    drop, act = getattr(old, "drop", None), getattr(old, "act", None)
    if type(act) is nn.ReLU and isinstance(drop, (nn.Identity, type(None))):
        norm.activation = "relu"
    elif act is not None:
        norm.__class__ = FusedGroupNormAct
        norm.drop, norm.act = drop or nn.Identity(), act


def _add(slot: Slot, norm: FusedGroupNorm) -> None:
    if slot.parent is slot.conv:
        give_norm(slot.conv, norm)
    elif is_conv_module(slot.parent):
        # As mmcv builds it, so that state-dict keys match those of a config with GN.
        slot.parent.with_norm, slot.parent.norm_name = True, "gn"
        slot.parent.add_module("gn", norm)
    else:
        insert_norm(slot.parent, slot.conv, norm)
    if SITES[slot.site].drops_bias:
        slot.conv.bias = None
