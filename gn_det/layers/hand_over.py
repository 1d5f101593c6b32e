"""Hand-over: a GN that starts as the frozen BN that it replaces, and becomes GN gradually."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gn_det.errors import InputError
from gn_det.layers.group_norm import FusedGroupNorm, FusedGroupNormAct
from gn_det.text import shortened

__all__ = ["HandOver", "eps_of", "finish", "hand_over_from", "hand_overs", "statistics_of"]

_STATISTICS = ("running_mean", "running_var")


class HandOver:
    """Mixin for FusedGroupNorm, first among the bases: the layer is (1 − α) · BN(x) + α · GN(x).

    BN is frozen. Before :meth:`begin`, its statistics can be loaded under its own names, and the
    norm is a plain GN that refuses to train. Afterwards the state dict has γ and β of the GN alone.

    Attributes:
        alpha: the part of GN, from 0 to 1.
        running_mean, running_var: (C,) statistics of BN, before :meth:`begin`.
        bn_scale, bn_shift: (C,) BN as x · scale + shift, from then on; not in the state dict.
        bn_eps: of BN.
        lacks_statistics: whether weights without them were loaded: of GN, or of BN that is folded.
        is_of_gn: whether gn_det's checkpointer found that they are of GN; None where another one
            loaded them.
    """

    alpha: float
    bn_eps: float
    lacks_statistics = False
    is_of_gn: bool | None = None

    def normalize(self, x: Tensor, activation: str | None = None) -> Tensor:
        if self.training and "running_mean" in self._buffers:
            raise InputError(
                "the norms wait for a hand-over (MODEL.GN.HAND_OVER_STEPS, or hand_over=True), and "
                "nothing hands over to GN: set train.hand_over_steps of a LazyConfig, or give the "
                "trainer gn_det.engine.hand_over.HandOverHook(model, steps) by its register_hooks"
            )
        gn = super().normalize(x)
        if self.alpha < 1:
            gn = torch.lerp(self.bn_of(x), gn, self.alpha)
        return F.relu(gn) if activation is not None else gn

    def bn_of(self, x: Tensor) -> Tensor:
        """What BN makes of an input, in its dtype."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale, shift = (y.view(shape).to(x.dtype) for y in (self.bn_scale, self.bn_shift))
        return x * scale + shift

    def has_values_of_bn(self) -> bool:
        """Whether BN, before :meth:`begin`, is not as one that never trained."""
        if (self.weight.min() == self.weight.max()) and self.weight[0] in (0, 1):  # at a start
            apart = (self.running_mean, self.bias, self.running_var - 1)
            # Detectron2's FrozenBN begins with a variance of 1 - eps.
            return any(bool(x.abs().max() > 1.01 * self.bn_eps) for x in apart)
        return True

    def begin(self) -> None:
        """Take BN from the weights that are loaded: γ and β are still its."""
        with torch.no_grad():
            scale = self.weight * (self.running_var + self.bn_eps).rsqrt()
            self.set_bn({"scale": scale, "shift": self.bias - self.running_mean * scale})

    def set_bn(self, bn: Mapping[str, Tensor]) -> None:
        """Set BN as its scale and shift, in place of statistics."""
        for name in _STATISTICS:
            self._buffers.pop(name, None)
        for name, value in bn.items():
            value = value.detach().clone().to(self.weight.device)
            self.register_buffer(f"bn_{name}", value, persistent=False)

    def bn(self) -> dict[str, Tensor]:
        """What :meth:`set_bn` takes."""
        return {"scale": self.bn_scale, "shift": self.bn_shift}

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list, *rest: Any
    ) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        if "running_mean" not in self._buffers:  # weights of a network with BN, after the begin
            for name in _STATISTICS:
                state_dict.pop(f"{prefix}{name}", None)
        if f"{prefix}weight" in state_dict:
            self.lacks_statistics = f"{prefix}running_mean" not in state_dict
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        # Weights of GN have none, and those of Caffe's BN are folded.
        missing[:] = [key for key in missing if key not in {f"{prefix}{n}" for n in _STATISTICS}]


class HandOverGroupNorm(HandOver, FusedGroupNorm):
    """FusedGroupNorm with a hand-over."""


class HandOverGroupNormAct(HandOver, FusedGroupNormAct):
    """FusedGroupNormAct with a hand-over."""


# Running mean, running variance, eps.
Statistics = tuple[Tensor, Tensor, float]

_CLASSES: dict[type, type] = {
    FusedGroupNorm: HandOverGroupNorm,
    FusedGroupNormAct: HandOverGroupNormAct,
}


def statistics_of(model: nn.Module) -> dict[str, Statistics | None]:
    """Running mean, running variance and eps of each BN of a model, by its name; None without.

    BN of any kind that has running statistics, PyTorch's without such, and norms whose hand-over
    has not begun.
    """
    found: dict[str, Statistics | None] = {}
    for name, module in model.named_modules():
        if getattr(module, "running_mean", None) is not None:
            found[name] = (module.running_mean, module.running_var, eps_of(module))
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            found[name] = None
    return found


def eps_of(bn: Any) -> float:
    """Of a BN of any kind; measured where its class has eps in the code of its forward alone."""
    if isinstance(bn, HandOver):
        return bn.bn_eps
    return bn.eps if hasattr(bn, "eps") else _measured_eps(bn)


@torch.no_grad()
def _measured_eps(bn: nn.Module) -> float:
    """With a variance of 0, BN multiplies by 1 / √eps."""
    bn = copy.deepcopy(bn).cpu().double().eval()
    for tensor, value in ((bn.weight, 1), (bn.bias, 0), (bn.running_mean, 0), (bn.running_var, 0)):
        if tensor is not None:
            tensor.fill_(value)
    ones = torch.ones(1, len(bn.running_var), 1, 1, dtype=torch.float64)
    return float(bn.forward(ones).max()) ** -2  # whose hooks are of the layer itself


def hand_over_from(model: nn.Module, bns: Mapping[str, Statistics | None]) -> None:
    """Let the GN layers of a model that replaced BN be handed over, in place.

    Args:
        model: after inject.
        bns: :func:`statistics_of` the model before inject.

    Raises:
        InputError: some of these BN layers have no statistics, or no γ and β.
    """
    gn = {name: m for name, m in model.named_modules() if name in bns and type(m) in _CLASSES}
    unable = [name for name, module in gn.items() if bns[name] is None or module.weight is None]
    if unable:
        raise InputError(
            f"{len(unable)} of {len(gn)} BN layers have no statistics, or no γ and β to fit "
            f"({shortened(unable, 3)}), and a hand-over needs both"
        )
    for name, module in gn.items():
        if (statistics := bns[name]) is not None:
            mean, variance, eps = statistics
            module.__class__ = _CLASSES[type(module)]
            module.alpha, module.bn_eps = 1.0, eps
            module.register_buffer("running_mean", mean.detach().clone())
            module.register_buffer("running_var", variance.detach().clone())


def hand_overs(model: nn.Module) -> Iterator[tuple[str, HandOver]]:
    """The norms of a model that are handed over, by name."""
    for name, module in model.named_modules():
        if isinstance(module, HandOver):
            yield name, module


def finish(model: nn.Module) -> None:
    """Make each norm that is handed over a plain GN, in place."""
    plain = {hand_over: kind for kind, hand_over in _CLASSES.items()}
    for _, norm in [*hand_overs(model)]:
        for name in (*_STATISTICS, "bn_scale", "bn_shift"):
            norm._buffers.pop(name, None)
            norm._non_persistent_buffers_set.discard(name)
        for name in ("alpha", "bn_eps", "lacks_statistics", "is_of_gn"):
            vars(norm).pop(name, None)
        norm.__class__ = plain[type(norm)]
