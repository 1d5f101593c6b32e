"""Convert: put FusedGroupNorm into a built model, in place."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import nn

from gn_det.errors import InputError
from gn_det.injection.sites import DEFAULT_SITES, SITES, Slot, find_owners, find_slots
from gn_det.layers import FusedGroupNorm, default_num_groups, give_norm, insert_norm
from gn_det.utils import nearest

__all__ = ["inject"]


def inject(
    model: nn.Module,
    sites: str | Sequence[str] = "default",
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
) -> nn.Module:
    """Put FusedGroupNorm at sites of a model, in place.

    A norm that is there (BN, SyncBN, FrozenBN, GN) is replaced, its γ and β carried over. A
    convolution without one gains it, and loses its bias where Detectron2's own GN models have none
    (backbone, FPN, box, mask and semantic heads), so the state-dict keys are theirs. In the towers
    of RetinaNet and FCOS, where later modules move up, weights from before still load. A norm
    follows its convolution in device, dtype and whether it trains, so FREEZE_AT holds.

    Build the optimizer afterwards: the norms' parameters are new.

    Args:
        model: of Detectron2 or torchvision or any other, or a component of one.
        sites: names of SITES, or one of them. "default" stands for those that Detectron2's NORM
            keys reach, and norms outside of Detectron2's parts ("other"); "ALL" for all. Those
            that have nothing to normalise are left out of these two, not of names.
        num_groups: G; where the channels are no multiple of it, the largest divisor below it.
            Default: a GN layer's own, 32 for the others.
        channels_per_group: in place of num_groups; where the channels are no multiple of it, the
            largest divisor below it.

    Returns:
        model.

    Raises:
        InputError: an unknown site, a site with nothing to normalise (the message says what is
            there), or both ways to say how many groups.
        ValueError: num_groups or channels_per_group is below 1.
    """
    if num_groups is not None and channels_per_group is not None:
        raise InputError(
            f"num_groups {num_groups} and channels_per_group {channels_per_group} are two ways to "
            "say the same; give one"
        )
    slots = find_slots(model)
    chosen = _choose(model, slots, [sites] if isinstance(sites, str) else sites)
    holders = defaultdict(list)  # several, where modules share a norm
    for parent in model.modules():
        for child in parent.children():
            holders[child].append(parent)
    for slot in slots:
        if slot.site in chosen:
            norm = _norm_for(slot, num_groups, channels_per_group)
            if slot.norm is None:
                _add(slot, norm)
            else:
                for holder in holders[slot.norm]:
                    _replace(holder, slot.norm, norm)
    return model


def _choose(model: nn.Module, slots: Iterable[Slot], sites: Sequence[str]) -> set[str]:
    """The sites that are meant, each checked to have a slot."""
    groups = {"default": DEFAULT_SITES, "ALL": tuple(SITES)}
    there = Counter(slot.site for slot in slots)
    chosen: set[str] = set()
    for site in sites:
        if site in groups:
            chosen |= there.keys() & set(groups[site])
        elif site not in SITES:
            known = [*groups, *SITES]
            raise InputError(
                f"no site {site!r}{nearest(site, known)}; there are {', '.join(known)}"
            )
        elif site not in there:
            raise InputError(f"{_nothing_at(model, site)}. {_what_is_there(model, there)}")
        else:
            chosen.add(site)
    if not chosen:
        raise InputError(
            f"nothing to normalise at {', '.join(sites) or 'no sites'}. "
            f"{_what_is_there(model, there)}"
        )
    return chosen


def _nothing_at(model: nn.Module, site: str) -> str:
    found = [
        f"{name or 'the model'} ({type(m).__name__})" for name, m, _ in find_owners(model, site)
    ]
    if not found or site == "other":
        return f"site {site}: {type(model).__name__} has none"
    hint = SITES[site].hint and f": {SITES[site].hint}"
    return f"site {site}: {', '.join(found)} has nothing to normalise{hint}"


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


def _norm_for(slot: Slot, num_groups: int | None, channels_per_group: int | None) -> FusedGroupNorm:
    old, conv = slot.norm, slot.conv
    channels = _num_channels(slot)
    eps = 1e-5
    if channels_per_group is not None:
        groups = channels // default_num_groups(channels, at_most=channels_per_group)
    elif num_groups is not None:
        groups = default_num_groups(channels, at_most=num_groups)
    elif isinstance(old, nn.GroupNorm):
        groups = old.num_groups
    else:
        groups = default_num_groups(channels)
    if isinstance(old, nn.GroupNorm):
        eps = old.eps
    affine = old is None or old.weight is not None
    like = _first_tensor(old if conv is None else conv)
    norm = FusedGroupNorm(
        channels, groups, eps, affine,
        activation=_activation_of(old), device=like.device, dtype=like.dtype,
    )  # fmt: skip
    if affine and old is not None:
        with torch.no_grad():
            norm.weight.copy_(old.weight)
            norm.bias.copy_(old.bias)
    # FrozenBN's are buffers, which tell nothing of whether a layer is frozen.
    trains = like.requires_grad or not isinstance(like, nn.Parameter)
    return norm.requires_grad_(trains).train((conv if old is None else old).training)


def _first_tensor(module: nn.Module) -> torch.Tensor:
    """Whose device and dtype a new norm takes, and whether it trains."""
    return next(chain(module.parameters(), module.buffers()), torch.empty(0))


def _activation_of(norm: nn.Module | None) -> str | None:
    if isinstance(norm, FusedGroupNorm):
        return norm.activation
    return "relu" if isinstance(getattr(norm, "act", None), nn.ReLU) else None


def _num_channels(slot: Slot) -> int:
    if slot.conv is not None and hasattr(slot.conv, "out_channels"):
        return slot.conv.out_channels
    for name in ("num_features", "num_channels"):
        if hasattr(slot.norm, name):
            return getattr(slot.norm, name)
    return len(slot.norm.weight)


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
