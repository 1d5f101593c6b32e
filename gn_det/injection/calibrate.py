"""Passes over a calibration set that fit γ, β of GN to the outputs of the BN that it replaced."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.injection.batches import running_converted, running_on
from gn_det.injection.kinds import Layer
from gn_det.injection.least_squares import ChannelFit, sums_of_gn
from gn_det.injection.regions import Regions
from gn_det.layers.hand_over import eps_of

__all__ = ["Calibrated", "Call", "Pair", "calibrate", "mean"]

# Passes end when the error of no norm changes by more.
_SETTLED = 0.005

Call = Callable[[nn.Module, Any], Any]
Errors = Mapping[str, float | None]
# Of each norm, what sums_of_gn tells of each of its inputs, in their order.
Inputs = dict[str, list[Tensor]]


class Pair(NamedTuple):
    """A model with BN and its copy with GN.

    Attributes:
        model: with BN.
        converted: with GN.
        bns, norms: the layers that replace each other, by name.
        call: runs either model on a batch.
    """

    model: nn.Module
    converted: nn.Module
    bns: Mapping[str, nn.Module]
    norms: Mapping[str, nn.GroupNorm]
    call: Call


class Calibrated(NamedTuple):
    """What :func:`calibrate` did.

    Attributes:
        fits: by name, in the order of execution, of the norms that were reached.
        passes: that fitted.
        copied, calibrated: errors of the norms before and after, by name.
    """

    fits: dict[str, ChannelFit]
    passes: int
    copied: Errors
    calibrated: Errors


def calibrate(pair: Pair, batches: Iterable[Any]) -> Calibrated:
    """Fit γ, β of the norms in place, if that lowers their mean error.

    A norm is fitted at each input, before it computes its output, so that the norms behind it see
    the fit at once. The fit is to the inputs of this pass and, for those still to come, to the
    inputs of the pass before.

    Raises:
        InputError: see :func:`gn_det.convert_bn`.
    """
    copied_states = {name: deepcopy(norm.state_dict()) for name, norm in pair.norms.items()}
    copied = errors = _errors(pair, _fits(_pass(pair, batches)))
    inputs: Inputs = {}
    passes, change = 0, float("inf")
    while change > _SETTLED and passes < len(pair.norms):
        inputs = _pass(pair, batches, inputs)
        before, errors = errors, _errors(pair, _fits(inputs))
        change, passes = _change(before, errors), passes + 1
    fits = _fits(_pass(pair, batches))
    calibrated = _errors(pair, fits)
    if mean(calibrated) > mean(copied):
        for name, state in copied_states.items():
            pair.norms[name].load_state_dict(state)
        calibrated = copied
    return Calibrated(fits, passes, copied, calibrated)


def mean(errors: Errors) -> float:
    """Of those that are known."""
    known = [error for error in errors.values() if error is not None]
    return sum(known) / len(known) if known else 0.0


def _pass(pair: Pair, batches: Iterable[Any], before: Inputs | None = None) -> Inputs:
    """What each norm gets in the converted model, and is to make of it.

    Args:
        pair: of models.
        batches: the calibration set.
        before: of the pass before; γ, β are fitted on the way. None: they stay.
    """
    inputs: Inputs = defaultdict(list)
    # Of this pass, and of the pass before for inputs that are still to come.
    sums = {name: torch.stack(parts).sum(0) for name, parts in (before or {}).items()}
    wanted: dict[str, list[Tensor]] = defaultdict(list)

    def record(name: str, x: Tensor) -> None:
        wanted[name].append(_bn(pair.bns[name], x, len(wanted[name])))

    regions = Regions()

    def compare(name: str, x: Tensor) -> None:
        if regions.others:
            raise InputError(
                f"{regions.others} looks at other boxes in the converted model than in the model "
                f"with BN, so that {name} gets other regions; give both models the same boxes, as "
                "gn_det.run_on_boxes does for Detectron2's detectors, by a call of your own"
            )
        y = wanted[name].pop(0) if wanted[name] else None
        if y is None or y.shape != x.shape:
            there = "nothing" if y is None else f"a {tuple(y.shape)} tensor"
            raise InputError(
                f"{name} gets a {tuple(x.shape)} tensor in the converted model and {there} in the "
                "model with BN; give both models the same intermediate results, such as boxes"
            )
        if x.numel():
            norm = pair.norms[name]
            new = sums_of_gn(x, norm.num_groups, norm.eps, y)
            if before is not None and norm.weight is not None:
                old = before.get(name, [])[len(inputs[name]) :][:1]
                sums[name] = sums.get(name, 0) - sum(old) + new
                ChannelFit(sums[name]).set(norm)
            inputs[name].append(new)

    for batch in batches:
        wanted.clear()
        with _inputs(pair.bns, record), regions.recorded(pair.model), running_on(batch):
            pair.call(pair.model, batch)
        with (
            _inputs(pair.norms, compare),
            regions.compared(pair.converted),
            running_converted(),
        ):
            pair.call(pair.converted, batch)
        for name, left in wanted.items():
            if left:
                raise InputError(f"the converted model calls {name} less often than that with BN")
    if not inputs:
        raise InputError("no batch of the calibration set reaches a norm that is converted")
    for name, parts in inputs.items():
        if not all(part.isfinite().all() for part in parts):
            raise InputError(f"the input or the output of {name} is not finite")
    return inputs


def _fits(inputs: Inputs) -> dict[str, ChannelFit]:
    return {name: ChannelFit(torch.stack(parts).sum(0)) for name, parts in inputs.items()}


@contextmanager
def _inputs(norms: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Let see(name, x) look at every input of the norms."""
    with ExitStack() as hooks:
        for name, norm in norms.items():
            # GN has the hooks of the BN that it replaced, which somebody may still call.
            hooks.enter_context(
                norm.register_forward_pre_hook(
                    lambda called, args, name=name, norm=norm: (
                        see(name, args[0]) if called is norm else None
                    )
                )
            )
        yield


def _bn(bn: Layer, x: Tensor, call: int) -> Tensor:
    """What BN makes of x by its running statistics, before an activation, in float32 or float64.

    Args:
        call: how many calls on this batch there were before: a list of BN layers cycles.
    """
    statistics: Layer = bn[call % len(bn)] if isinstance(bn, nn.ModuleList) else bn
    scale = (statistics.running_var.double() + eps_of(statistics)).rsqrt()
    shift = -statistics.running_mean.double() * scale
    if bn.weight is not None:
        scale = scale * bn.weight
        shift = shift * bn.weight
    if bn.bias is not None:
        shift = shift + bn.bias
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = x.double() * scale.view(shape) + shift.view(shape)
    return y.to(torch.promote_types(x.dtype, torch.float32))


def _errors(pair: Pair, fits: Mapping[str, ChannelFit]) -> dict[str, float | None]:
    return {name: _error(pair.norms[name], fit) for name, fit in fits.items()}


def _error(norm: nn.GroupNorm, fit: ChannelFit) -> float | None:
    if norm.weight is None:
        ones = torch.ones(norm.num_channels, device=fit.sums.device)
        return fit.relative_error(ones, 0 * ones)
    return fit.relative_error(norm.weight, norm.bias)


def _change(before: Errors, after: Errors) -> float:
    """Of the error of the norm that changed most."""
    pairs = ((error, after[name]) for name, error in before.items())
    return max((abs(b - a) for a, b in pairs if a is not None and b is not None), default=0.0)
