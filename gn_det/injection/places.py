"""Every place of a model where a norm is or could be, of known parts and of others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from gn_det.injection.one_pixel import gated_modules
from gn_det.injection.parts import parts_of
from gn_det.injection.sites import SITES, Slot, find_by_type, find_owners, sites_of_owners
from gn_det.injection.without_norm import ConvScan, ConvWithoutNorm

__all__ = ["Places", "find_places"]


class Places(NamedTuple):
    """Everything of a model where a norm is or could be.

    Attributes:
        slots: every place for a norm, each once and at the first site that has it.
        without_norm: the convolutions that have no norm and are no place for one, with the reason.
        gated: the modules in gates, whose norms stay.
    """

    slots: list[Slot]
    without_norm: list[ConvWithoutNorm]
    gated: set[nn.Module]

    @property
    def norms(self) -> set[nn.Module]:
        """Every norm that inject can replace, with those in lists of norms."""
        found = (slot.norm for slot in self.slots if slot.norm is not None)
        return {part for norm in found for part in norm.modules()}


def find_places(model: nn.Module) -> Places:
    """Every place for a norm in a model, and the convolutions that are none."""
    gated = gated_modules(model)
    slots = [*_slots_of_owners(model, gated)]
    found = {part for slot in slots for part in _occupied(slot)} | gated
    scan = ConvScan(model, parts_of(model, sites_of_owners(model)), gated)
    names = {module: name for name, module in scan.names.items()}
    for parent, conv, norm in find_by_type(model):
        if norm not in found:
            found |= {*norm.modules()}
            before = norm if conv is None else conv
            slots.append(Slot(scan.site(names[before], before), parent, conv, norm, known=False))
    with_conv = [slot for slot in slots if slot.conv is not None]
    for slot in with_conv:
        scan.taken_norms |= {*slot.norm.modules()} if slot.norm is not None else set()
    bare = [*scan.convs_without_norm({slot.conv for slot in with_conv})]
    for each in bare:
        if not each.why_not:
            slots.append(Slot(each.site, each.holder, each.conv, None, known=False))
    order = {site: index for index, site in enumerate(SITES)}
    slots.sort(key=lambda slot: order[slot.site])
    return Places(slots, [each for each in bare if each.why_not], gated)


def _slots_of_owners(model: nn.Module, gated: set[nn.Module]) -> Iterator[Slot]:
    """The places that are known by the class of the part."""
    found = set(gated)
    for site, (owners, *_) in SITES.items():
        for _, owner, kind in find_owners(model, site):
            try:
                places = [*owners[kind](owner)]
            except AttributeError:  # a subclass that was built without the parts of its base
                continue
            for parent, conv, norm in places:
                slot = Slot(site, parent, conv, norm)
                if found.isdisjoint(_key(slot)):
                    found |= _occupied(slot)
                    yield slot


def _key(slot: Slot) -> set[nn.Module]:
    return {slot.conv if slot.norm is None else slot.norm}


def _occupied(slot: Slot) -> set[nn.Module]:
    return _key(slot) if slot.norm is None else set(slot.norm.modules())
