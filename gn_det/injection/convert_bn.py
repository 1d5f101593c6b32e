"""From BN to GN: norms replaced, their γ, β fitted to what the BN layers put out."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.injection.calibrate import Call, Pair, calibrate, mean
from gn_det.injection.choose import Which, choose_slots
from gn_det.injection.eval_mode import eval_mode
from gn_det.injection.inject import place_norms
from gn_det.injection.kinds import Layer
from gn_det.injection.places import Places, find_places
from gn_det.injection.report import Report
from gn_det.injection.sites import SITES, Slot
from gn_det.layers import Groups
from gn_det.text import markdown, printable, reason_of, table

__all__ = ["Calibration", "CalibrationRow", "bn_sites", "convert_bn", "has_bn"]


@dataclass(frozen=True)
class CalibrationRow:
    """A norm that was converted.

    Errors are ‖gn − bn‖ / ‖bn − mean(bn)‖ over the whole calibration set: gn is the norm's output
    in the converted model (before an activation), with the errors of the norms before it; bn is
    that of the BN layer in the model as it was, and its mean is taken over all elements of a
    channel. 1 is no better than a constant in each channel. None where bn is constant, or the norm
    not reached.

    Attributes:
        name: of the module.
        site: key of SITES.
        channels: C.
        num_groups: G.
        values: of each channel that were seen; 0 where the calibration set does not reach it.
        constant_channels: those whose normalized input does not vary, and which kept the BN's γ.
        copied: error with γ, β of the BN, everywhere in the model.
        calibrated: error with γ, β fitted, everywhere in the model.
    """

    name: str
    site: str
    channels: int
    num_groups: int
    values: int
    constant_channels: int
    copied: float | None
    calibrated: float | None


@dataclass(frozen=True)
class Calibration(Report):
    """What :func:`gn_det.convert_bn` did; str() is the table.

    Attributes:
        rows: in the order of execution, norms that were not reached last.
        passes: over the calibration set in which γ, β were fitted.
        copied, calibrated: mean error of the norms.
        not_converted: layers with running statistics that GN does not stand in for, at any site;
            :func:`gn_det.audit` has the reasons.
    """

    rows: tuple[CalibrationRow, ...]
    passes: int
    copied: float
    calibrated: float
    not_converted: tuple[str, ...] = ()

    @property
    def not_reached(self) -> tuple[str, ...]:
        """Norms that the calibration set did not reach, which kept γ, β of the BN."""
        return tuple(row.name for row in self.rows if row.values == 0)

    def _tables(self, style: str) -> str:
        headers = ["norm", "site", "channels", "groups", "constant", "copied", "calibrated"]
        rows = [
            [
                row.name,
                row.site,
                row.channels,
                row.num_groups,
                row.constant_channels or "",
                row.copied,
                row.calibrated,
            ]
            for row in self.rows
        ]
        rows.append(["mean", "", "", "", "", self.copied, self.calibrated])
        text = table(rows, headers, tablefmt=style, floatfmt=".3f", missingval="-")
        if any(row.constant_channels for row in self.rows):
            text += "\n\nconstant: channels whose normalized input does not vary, with the BN's γ"
        shown = markdown if style == "github" else printable
        if self.not_reached:
            text += (
                f"\n\nNot reached by the calibration set, γ and β of the BN kept: "
                f"{', '.join(map(shown, self.not_reached))}"
            )
        if self.not_converted:
            text += (
                "\n\nNot converted, though with running statistics (gn_det.audit has the reasons): "
                f"{', '.join(map(shown, self.not_converted))}"
            )
        return text


def convert_bn(
    model: nn.Module,
    batches: Iterable[Any],
    call: Call = lambda model, batch: model(batch),
    sites: Which | Sequence[Which] = "ALL",
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    min_channels_per_group: int = 1,
) -> Calibration:
    """Convert a trained BN model to GN: replace each BN layer, and fit γ and β to its outputs.

    BN, SyncBN and FrozenBN become FusedGroupNorm; the convolutions are not changed. For each
    channel, γ and β are the closed-form least-squares fit of the GN output to the output of the BN
    layer with running statistics, over the whole calibration set.

    The input of a norm depends on the norms before it, so each norm is fitted anew at every input,
    before it computes its output, and passes over the calibration set are repeated until no error
    changes by more than 0.005, at the latest after one pass per norm. γ and β stay copied if the
    mean error is not smaller in the end. Each pass runs the BN model and the GN model once per
    batch, in eval mode without gradients, and holds the outputs of all BN layers for one batch.

    If the normalized input of a channel is constant, γ of the BN layer is kept and only β is
    fitted. A norm that the calibration set does not reach keeps γ and β of the BN layer, and is
    reported. A norm without γ and β (affine=False) has nothing to fit. Modes, hooks, frozen layers
    and names are as :func:`gn_det.inject` leaves them.

    Args:
        model: a model with trained BN layers. It is modified in place; after an error it is
            unchanged.
        batches: the calibration set, an iterable that can be read several times, such as a list.
        call: ``call(model, batch)`` runs a model on one batch. Both models have to take the same
            path: where a model continues from its own results, as a detector does from its boxes,
            the batch has to fix them, as :func:`gn_det.run_on_boxes` does. Default:
            ``model(batch)``.
        sites: see :func:`gn_det.inject`; "default" and "ALL" mean those of their sites that have
            BN. Default: "ALL".
        num_groups, channels_per_group, min_channels_per_group: see :func:`gn_det.inject`.

    Returns:
        Calibration. str() of it is a table with the error of each norm, with γ and β copied and
        fitted.

    Raises:
        InputError: a site has no BN or other layers beside BN (see :func:`bn_sites`), BN has no
            running statistics, the model cannot be copied, batches can be read only once or reach
            no converted norm, a value is not finite, or the two models take different paths or look
            at different boxes.

    Example::

        from torchvision.models import resnet18

        classifier = resnet18()  # in practice with your trained weights
        batches = [torch.rand(4, 3, 64, 64) for _ in range(2)]
        print(gn_det.convert_bn(classifier, batches))
    """
    if isinstance(batches, Iterator):
        raise InputError(
            f"calibration goes through the batches several times, and a {type(batches).__name__} "
            "can be read once; give a list"
        )
    groups = Groups(num_groups, channels_per_group, min_channels_per_group)
    places = find_places(model)
    slots = _slots_with_bn(model, places, sites, groups)
    names = {module: name for name, module in model.named_modules()}
    bn_slots = {names[slot.norm]: slot for slot in slots if _is_bn(slot.norm)}
    bns = {name: slot.norm for name, slot in bn_slots.items()}
    for name, bn in bns.items():
        _check_statistics(name, bn)
    reached = places.norms
    with_statistics = (m for m in names if getattr(m, "running_mean", None) is not None)
    not_converted = tuple(names[module] for module in with_statistics if module not in reached)
    converted = _copied(model)
    place_norms(converted, _slots_with_bn(converted, find_places(converted), sites, groups), groups)
    norms: dict[str, Any] = {name: converted.get_submodule(name) for name in bns}

    with eval_mode(model), eval_mode(converted), torch.no_grad():
        result = calibrate(Pair(model, converted, bns, norms, call), batches)

    place_norms(model, slots, groups)
    for name, norm in norms.items():
        model.get_submodule(name).load_state_dict(norm.state_dict())
    fits = result.fits
    return Calibration(
        tuple(
            CalibrationRow(
                name,
                bn_slots[name].site,
                norms[name].num_channels,
                norms[name].num_groups,
                fits[name].count if name in fits else 0,
                int(fits[name].constant.sum()) if name in fits else 0,
                result.copied.get(name),
                result.calibrated.get(name),
            )
            for name in dict.fromkeys([*fits, *norms])
        ),
        result.passes,
        mean(result.copied),
        mean(result.calibrated),
        not_converted,
    )


def bn_sites(
    model: nn.Module,
    sites: Which | Sequence[Which] = "ALL",
    *,
    num_groups: int | None = None,
    channels_per_group: int | None = None,
    min_channels_per_group: int = 1,
) -> list[str]:
    """The sites of a model where inject would replace BN layers, and change nothing else.

    Args:
        model, sites, num_groups, channels_per_group, min_channels_per_group: see
            :func:`convert_bn`.

    Returns:
        Keys of SITES.

    Raises:
        InputError: there is no BN at a site that is named, or at none of a group of sites; beside
            BN, a site has convolutions without a norm, or other norms, which inject would change.
    """
    groups = Groups(num_groups, channels_per_group, min_channels_per_group)
    found = {
        slot.site for slot in _slots_with_bn(model, find_places(model), sites, groups, whole=True)
    }
    return [site for site in SITES if site in found]


def _slots_with_bn(
    model: nn.Module,
    places: Places,
    sites: Which | Sequence[Which],
    groups: Groups,
    whole: bool = False,
) -> list[Slot]:
    """The places at sites of a model that have BN, or raise where others there would change.

    Args:
        whole: whether the sites have to be all BN; otherwise GN stays as it is, and so does a
            convolution without a norm in a part of an unknown class.
    """
    which = [sites] if isinstance(sites, str) or callable(sites) else sites
    chosen = choose_slots(model, places, which)
    with_bn = {slot.site for slot in chosen if _is_bn(slot.norm)}
    without = [site for site in which if site in SITES and site not in with_bn]
    if without or not with_bn:
        raise InputError(
            f"{type(model).__name__} has no BN, SyncBN or FrozenBN layer to convert at "
            f"{', '.join(map(str, without or which))}"
        )
    slots = [
        slot
        for slot in chosen
        if slot.site in with_bn
        and (whole or _is_bn(slot.norm) or (slot.norm is None and slot.known))
    ]
    for slot in slots:
        stays = isinstance(slot.norm, nn.GroupNorm) and (
            groups.is_default or groups.of(slot.norm.num_channels) == slot.norm.num_groups
        )
        if not _is_bn(slot.norm) and not stays:
            there = (
                "a convolution without a norm" if slot.norm is None else type(slot.norm).__name__
            )
            raise InputError(
                f"site {slot.site} has BN and also {there}, which would become GN and compute "
                "something else; convert the parts of the model that have BN one by one"
            )
    return slots


def has_bn(model: nn.Module) -> bool:
    """Whether a model has a layer that :func:`convert_bn` converts."""
    return any(_is_bn(slot.norm) for slot in find_places(model).slots)


def _is_bn(norm: Layer) -> bool:
    """Whether a norm is BN of any kind, a list of BN layers that cycles included."""
    return hasattr(norm, "running_mean") or isinstance(norm, nn.ModuleList)


def _check_statistics(name: str, bn: Layer) -> None:
    for part in bn if isinstance(bn, nn.ModuleList) else [bn]:
        if part.running_mean is None:
            raise InputError(
                f"{name} has no running statistics (track_running_stats=False), so that what it "
                "puts out depends on the batch"
            )


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; named tuples that hold no tensors, as old ShapeSpecs, need not be copyable.

    Raises:
        InputError: the model cannot be copied, as one with pruned weights.
    """
    memo: dict[int, Any] = {}
    seen: set[int] = set()

    def keep(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            if not any(isinstance(each, (Tensor, nn.Module, list, dict)) for each in value):
                memo[id(value)] = value
        elif isinstance(value, (dict, list, tuple)):
            for each in value.values() if isinstance(value, dict) else value:
                keep(each)

    for module in model.modules():
        keep(vars(module))
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied, and a copy is fitted to the model with BN "
            f"({reason_of(error)}). torch.nn.utils.prune.remove and remove_weight_norm make "
            "weights plain tensors, which can be"
        ) from error
