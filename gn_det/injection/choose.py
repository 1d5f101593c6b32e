"""Choose: which places of a model are meant by sites, by names of modules, or by a predicate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from gn_det.errors import InputError
from gn_det.injection.parts import parts_of
from gn_det.injection.places import Places
from gn_det.injection.sites import SITES, Slot, find_owners, sites_of_owners
from gn_det.injection.without_norm import ConvWithoutNorm
from gn_det.text import nearest, shortened

__all__ = ["Which", "choose_slots"]

# A site, the name or the pattern of modules, or what tells by name and module.
Which = str | Callable[[str, nn.Module], bool]


def choose_slots(model: nn.Module, places: Places, which: Iterable[Which]) -> list[Slot]:
    """The places that are meant, in the order of places.

    Raises:
        InputError: a site or a name is unknown or stands for nothing that could gain a norm.
    """
    which = [*which]
    names = {module: name for name, module in model.named_modules()}
    chosen: set[Slot] = set()
    for each in which:
        if callable(each):
            chosen |= _told(places, each, names)
        elif each in ("default", "ALL"):
            chosen |= {slot for slot in places.slots if each == "ALL" or slot.is_default}
        elif each in SITES:
            at = {slot for slot in places.slots if slot.site == each}
            if not at:
                raise InputError(f"{_nothing_at(model, places, each)}. {_there(model, places)}")
            chosen |= at
        else:
            chosen |= _named(model, places, each, names)
    if not chosen:
        told = ", ".join(each if isinstance(each, str) else "a predicate" for each in which)
        raise InputError(f"nothing to normalize at {told or 'no sites'}. {_there(model, places)}")
    order = {id(slot.norm or slot.conv): n for n, slot in enumerate(places.slots)}
    return sorted(chosen, key=lambda slot: order.get(id(slot.norm or slot.conv), len(order)))


def _told(
    places: Places,
    tells: Callable[[str, nn.Module], bool],
    names: dict[nn.Module, str],
) -> set[Slot]:
    slots = {
        slot for slot in places.slots if any(tells(names[part], part) for part in _parts(slot))
    }
    return slots | {_forced(bare) for bare in places.without_norm if tells(bare.name, bare.conv)}


def _named(
    model: nn.Module, places: Places, pattern: str, names: dict[nn.Module, str]
) -> set[Slot]:
    """The places that a name or pattern means: those of modules of the name, and below them."""
    matched = {name for name in names.values() if name and fnmatchcase(name, pattern)}
    if not matched:
        known = ["default", "ALL", *SITES]
        raise InputError(
            f"no site {pattern!r}{nearest(pattern, known)}; there are {', '.join(known)}; and no "
            f"module of {type(model).__name__} has that name"
        )

    def is_meant(name: str) -> bool:
        return any(name == one or name.startswith(f"{one}.") for one in matched)

    slots = {slot for slot in places.slots if any(is_meant(names[part]) for part in _parts(slot))}
    # Who writes the whole name of a convolution means it, whatever it looks like.
    slots |= {_forced(bare) for bare in places.without_norm if bare.name == pattern}
    if not slots:
        left = [bare for bare in places.without_norm if is_meant(bare.name)]
        raise InputError(f"nothing to normalize at {pattern}{_left(left)}")
    return slots


def _parts(slot: Slot) -> Iterator[nn.Module]:
    """The modules by whose names a place can be called."""
    yield from (part for part in (slot.conv, slot.norm) if part is not None)


def _forced(bare: ConvWithoutNorm) -> Slot:
    if bare.holder is None:
        raise InputError(
            f"{bare.name} is a {type(bare.conv).__name__}, which has no place for a norm"
        )
    return Slot(bare.site, bare.holder, bare.conv, None, known=False)


def _nothing_at(model: nn.Module, places: Places, site: str) -> str:
    """That a site has no place, and what was found there."""
    of_class = [(name, module) for name, module, _ in find_owners(model, site)]
    parts = parts_of(model, sites_of_owners(model))
    there = {part.name for part in parts.values() if part.site == site.partition(".")[0]}
    found = of_class or [(name, model.get_submodule(name)) for name in there]
    if not found or site == "other":
        kind = type(model).__name__
        return f"site {site}: {kind} has none that a class or the name of a module tells of"
    listed = ", ".join(f"{name or 'the model'} ({type(m).__name__})" for name, m in found)
    hint = SITES[site].hint and f": {SITES[site].hint}" if of_class else ""
    left = [
        bare for bare in places.without_norm if any(_lies_in(bare.name, name) for name, _ in found)
    ]
    return f"site {site}: {listed} has nothing to normalize{hint or _left(left)}"


def _lies_in(name: str, above: str) -> bool:
    return not above or name.startswith(f"{above}.")


def _left(left: list[ConvWithoutNorm]) -> str:
    """The convolutions that gain no norm, with the reasons."""
    reasons: dict[str, list[str]] = {}
    for bare in left:
        reasons.setdefault(bare.why_not, []).append(bare.name)
    told = "; ".join(f"{shortened(names, 3)}: {reason}" for reason, names in reasons.items())
    return f"; {told}; the whole name of a convolution gives it one" if told else ""


def _there(model: nn.Module, places: Places) -> str:
    kind = type(model).__name__
    there = Counter(slot.site for slot in places.slots)
    if there:
        listed = ", ".join(f"{site} {count}" for site, count in there.items())
        return f"The places for norms in {kind}: {listed}"
    empty = [
        _nothing_at(model, places, site)
        for site in SITES
        if site != "other" and any(find_owners(model, site))
    ]
    return "; ".join([f"{kind} has no place for a norm", *empty]) + (
        "" if empty else _left(places.without_norm)
    )
