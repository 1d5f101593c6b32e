"""Audit: which norms a model has, what they compute, and what was left without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from gn_det.injection.fuse import fused_forms
from gn_det.injection.recompute import recomputed_norms
from gn_det.injection.report import Report
from gn_det.injection.sites import DEFAULT_SITES, SITES, Slot, find_owners, find_slots
from gn_det.injection.standardize import is_standardized, why_not_standardizable
from gn_det.layers import default_num_groups
from gn_det.utils import table

__all__ = ["Audit", "LeftAlone", "NormRow", "audit"]


_BN_OR_GN = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)


@dataclass(frozen=True)
class NormRow:
    """GN layers of a site that are alike.

    Attributes:
        site: key of SITES.
        modules: their names in the model.
        channels: C.
        num_groups: G.
        parameters: of all of them together.
        form: what one call computes, such as "GN+add+ReLU"; "WS+GN+add+ReLU" behind convolutions
            with Weight Standardization; "GN+ReLU, recomputed" where the backward pass computes the
            result again, see :func:`gn_det.recompute`.
        trainable: whether γ and β train.
    """

    site: str
    modules: tuple[str, ...]
    channels: int
    num_groups: int
    parameters: int
    form: str
    trainable: bool


@dataclass(frozen=True)
class LeftAlone:
    """Modules without GN, or without Weight Standardization in a model with it, for one reason."""

    site: str
    modules: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Audit(Report):
    """What :func:`gn_det.audit` found; str() is the table."""

    rows: tuple[NormRow, ...]
    left_alone: tuple[LeftAlone, ...]

    @property
    def num_norms(self) -> int:
        """GN layers in all."""
        return sum(len(row.modules) for row in self.rows)

    def _tables(self, style: str) -> str:
        headers = ["site", "modules", "channels", "groups", "parameters", "form", "state"]
        rows = [
            [
                row.site,
                _shortened(row.modules),
                row.channels,
                f"{row.num_groups}{'*' if _is_reduced(row) else ''}",
                row.parameters,
                row.form,
                "trainable" if row.trainable else "frozen",
            ]
            for row in self.rows
        ]
        parameters = sum(row.parameters for row in self.rows)
        rows.append(["", f"{self.num_norms} in all", "", "", parameters, "", ""])
        text = table(
            rows, headers, tablefmt=style, colalign=["left"] * 2 + ["right"] * 3 + ["left"] * 2
        )
        if any(map(_is_reduced, self.rows)):
            text += "\n\n* the largest divisor of the channels below 32"
        if self.left_alone:
            left = [[each.site, _shortened(each.modules), each.reason] for each in self.left_alone]
            text += "\n\n" + table(left, ["site", "left alone", "why"], tablefmt=style)
        return text


def audit(model: nn.Module) -> Audit:
    """List the norms of a model, site by site, and the places that have no GN with the reason.

    Args:
        model: any model, injected or not. It is not changed.

    Returns:
        Audit. str() of it is a table, to_markdown() and to_json() give other formats, rows and
        left_alone the values.

    Example::

        table = gn_det.audit(gn_det.fuse(gn_det.inject(model)))
        print(table)
        assert "GN+add+ReLU" in {row.form for row in table.rows}
    """
    names = {module: name for name, module in model.named_modules()}
    forms, recomputed = fused_forms(model), recomputed_norms(model)
    slots = find_slots(model)
    standardized = any(is_standardized(slot.conv) for slot in slots)
    rows: dict[tuple, list[Slot]] = {}
    left: dict[tuple[str, str], list[str]] = {}
    for slot in slots:
        norm = slot.norm
        if isinstance(norm, nn.GroupNorm):
            trainable = norm.weight is not None and norm.weight.requires_grad
            form = str(forms[norm])
            if is_standardized(slot.conv):
                form = f"WS+{form}"
            elif standardized and (reason := why_not_standardizable(slot.conv)):
                left.setdefault((slot.site, reason), []).append(names[slot.conv or norm])
            if norm in recomputed:
                form += ", recomputed"
            key = (slot.site, norm.num_channels, norm.num_groups, form, trainable)
            rows.setdefault(key, []).append(slot)
        elif norm is None:
            left.setdefault((slot.site, _why_none(slot.site)), []).append(names[slot.conv])
        else:
            reason = f"{type(norm).__name__}; inject replaces it"
            left.setdefault((slot.site, reason), []).append(names[norm])
    for site, module, reason in _out_of_reach(model, slots):
        left.setdefault((site, reason), []).append(module)
    return Audit(
        tuple(
            NormRow(
                site,
                tuple(names[slot.norm] for slot in alike),
                channels,
                num_groups,
                sum(p.numel() for slot in alike for p in slot.norm.parameters()),
                form,
                trainable,
            )
            for (site, channels, num_groups, form, trainable), alike in rows.items()
        ),
        tuple(LeftAlone(site, tuple(each), reason) for (site, reason), each in left.items()),
    )


def _why_none(site: str) -> str:
    if site in DEFAULT_SITES:
        return "no norm; inject gives it one"
    return f"no norm; inject gives it one where sites name {site}"


def _out_of_reach(model: nn.Module, slots: list[Slot]) -> Iterator[tuple[str, str, str]]:
    """Owners without a place for a norm, and norms of kinds that GN does not stand in for."""
    there = {slot.site for slot in slots}
    for site in SITES:
        for name, _, _ in find_owners(model, site) if site not in (*there, "other") else ():
            yield site, name or "the model", SITES[site].hint or "nothing to normalize"
    reached = {part for slot in slots if slot.norm is not None for part in slot.norm.modules()}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if module in reached or not ("norm" in kind.lower() or isinstance(module, _BN_OR_GN)):
            continue
        if isinstance(module, nn.BatchNorm1d):
            yield "other", name, f"{kind} behind a linear layer, where a channel is one value"
        elif isinstance(module, _BN_OR_GN):
            yield "other", name, f"{kind}, which has a forward of its own"
        elif not [*module.children()]:
            yield "other", name, f"{kind}, which GN does not stand in for"


def _is_reduced(row: NormRow) -> bool:
    below_32 = default_num_groups(row.channels)
    return below_32 < 32 and row.num_groups == below_32


def _shortened(modules: tuple[str, ...]) -> str:
    """The module, or how many with the first of them."""
    return modules[0] if len(modules) == 1 else f"{len(modules)}: {modules[0]}, ..."
