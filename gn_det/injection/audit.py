"""Audit: which norms a model has, what they compute, and what was left without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from gn_det.injection.fuse import fused_forms, why_not_fused
from gn_det.injection.inject import has_bns_values
from gn_det.injection.kinds import is_called_norm, is_scripted
from gn_det.injection.places import Places, find_places
from gn_det.injection.recompute import recomputed_norms
from gn_det.injection.report import Report
from gn_det.injection.sites import SITES, Slot, find_owners, reads_statistics
from gn_det.injection.standardize import standardizes, why_not_standardizable
from gn_det.layers import default_num_groups
from gn_det.ops.form import Form
from gn_det.text import table

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
        of_bn: whether γ and β are still those that inject took from BN or FrozenBN, or that
            weights with BN brought.
        in_optimizer: whether an optimizer holds γ and β; None where audit was given none.
    """

    site: str
    modules: tuple[str, ...]
    channels: int
    num_groups: int
    parameters: int
    form: str
    trainable: bool
    of_bn: bool = False
    in_optimizer: bool | None = None

    @property
    def is_instance_norm(self) -> bool:
        """Whether each channel is a group of its own."""
        return self.num_groups == self.channels

    @property
    def state(self) -> str:
        """Whether γ, β train, and what is wrong with that."""
        if self.trainable:
            return "trainable, in no optimizer" if self.in_optimizer is False else "trainable"
        return "frozen, γ and β of BN" if self.of_bn else "frozen"


@dataclass(frozen=True)
class LeftAlone:
    """What does without something, for one reason.

    Modules without GN; in a model with Weight Standardization, those without it; in a fused model,
    norms that compute nothing else.

    Attributes:
        site: key of SITES.
        modules: convolutions without a norm, norms that are no GN or not fused, or parts without
            either.
        reason: why they stay as they are, or what inject does.
    """

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
                _counted(row.modules),
                row.channels,
                f"{row.num_groups}{'*' if _is_reduced(row) else ''}"
                f"{' (instance norm)' if row.is_instance_norm else ''}",
                row.parameters,
                row.form,
                row.state,
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
            left = [[each.site, _counted(each.modules), each.reason] for each in self.left_alone]
            text += "\n\n" + table(left, ["site", "left alone", "why"], tablefmt=style)
        return text


def audit(model: nn.Module, optimizer: Any = None) -> Audit:
    """List the norms of a model, site by site, and what has no GN with the reason.

    Every convolution without a norm is listed as well.

    Args:
        model: any model, injected or not. It is not changed.
        optimizer: what trains the model, with param_groups as PyTorch's optimizers have. Norms that
            it does not hold are marked. Default: none, which marks nothing.

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
    places = find_places(model)
    standardized = any(standardizes(slot.conv) for slot in places.slots)
    held: set[int] | None = None
    if optimizer is not None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    alike: dict[NormRow, list[nn.Module]] = {}  # by what they have in common
    left: dict[tuple[str, str], list[str]] = {}
    for slot in places.slots:
        norm = slot.norm
        if isinstance(norm, nn.GroupNorm):
            trainable = norm.weight is not None and norm.weight.requires_grad
            form = str(forms[norm])
            if standardizes(slot.conv):
                form = f"WS+{form}"
            elif standardized and (reason := why_not_standardizable(slot.conv)):
                left.setdefault((slot.site, reason), []).append(names[slot.conv or norm])
            if norm in recomputed:
                form += ", recomputed"
            row = NormRow(
                slot.site,
                modules=(),
                channels=norm.num_channels,
                num_groups=norm.num_groups,
                parameters=0,
                form=form,
                trainable=trainable,
                of_bn=has_bns_values(norm),
                in_optimizer=None if held is None else held.issuperset(map(id, norm.parameters())),
            )
            alike.setdefault(row, []).append(norm)
        elif norm is None:
            left.setdefault((slot.site, _why_none(slot)), []).append(names[slot.conv])
        else:
            reason = f"{type(norm).__name__}; inject replaces it"
            left.setdefault((slot.site, reason), []).append(names[norm])
    for site, module, reason in _out_of_reach(model, places):
        left.setdefault((site, reason), []).append(module)
    for bare in places.without_norm:
        left.setdefault((bare.site, bare.why_not), []).append(bare.name)
    if any(form != Form() for form in forms.values()):
        sites = {slot.norm: slot.site for slot in places.slots}
        for norm, why in why_not_fused(model).items():
            left.setdefault((sites.get(norm, "other"), f"not fused: {why}"), []).append(names[norm])
    rows = (
        replace(
            row,
            modules=tuple(names[norm] for norm in norms),
            parameters=sum(p.numel() for norm in norms for p in norm.parameters()),
        )
        for row, norms in alike.items()
    )
    left_alone = (LeftAlone(site, tuple(each), why) for (site, why), each in left.items())
    return Audit(tuple(rows), tuple(left_alone))


def _why_none(slot: Slot) -> str:
    if slot.is_default:
        return "no norm; inject gives it one"
    return f"no norm; inject gives it one where sites name {slot.site}"


def _out_of_reach(model: nn.Module, places: Places) -> Iterator[tuple[str, str, str]]:
    """Owners without a place for a norm, TorchScript, and norms that GN does not stand in for."""
    there = {slot.site for slot in places.slots}
    for site in SITES:
        for name, _, _ in find_owners(model, site) if site not in there else ():
            yield site, name or "the model", SITES[site].hint or "nothing to normalize"
    reached = places.norms
    for name, module in model.named_modules():
        kind = type(module).__name__
        holder = model.get_submodule(name.rpartition(".")[0])
        if is_scripted(module):
            if not (name and is_scripted(holder)):
                yield "other", name or "the model", "TorchScript, of which every part stays"
            continue
        if module in reached or not (is_called_norm(module) or isinstance(module, _BN_OR_GN)):
            continue
        if module in places.gated:
            why = f"{kind} in a gate behind global pooling: a channel is one value"
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                why += ", of which BN takes no statistics with one image: freeze it"
            yield "other", name, why
        elif isinstance(module, _BN_OR_GN) and name and reads_statistics(type(holder)):  # type: ignore[arg-type]
            yield "other", name, f"{kind}, whose statistics the code around it reads"
        elif isinstance(module, _BN_OR_GN) and "weight" not in module._parameters:
            yield "other", name, f"{kind}, whose weight is parametrized or pruned"
        elif isinstance(module, nn.BatchNorm1d):
            yield "other", name, f"{kind} of vectors, in which a channel is one value"
        elif isinstance(module, _BN_OR_GN):
            yield "other", name, f"{kind}, which has a forward of its own"
        elif not [*module.children()] and hasattr(module, "num_groups"):
            yield "other", name, f"{kind}, a GN of its own class, which stays"
        elif not [*module.children()]:
            yield "other", name, f"{kind}, which GN does not stand in for"


def _is_reduced(row: NormRow) -> bool:
    below_32 = default_num_groups(row.channels)
    return below_32 < 32 and row.num_groups == below_32


def _counted(modules: tuple[str, ...]) -> str:
    """The module, or how many with the first of them."""
    return modules[0] if len(modules) == 1 else f"{len(modules)}: {modules[0]}, ..."
