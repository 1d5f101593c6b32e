"""The hook that hands a model over from frozen BN to GN while it trains."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from gn_det.errors import InputError
from gn_det.injection import fuse
from gn_det.injection.least_squares import ChannelFit, sums_of_gn
from gn_det.layers.hand_over import HandOver, finish, hand_overs
from gn_det.text import shortened

__all__ = ["HandOverHook"]


class HandOverHook(HookBase):
    """Hands over from frozen BN to GN within so many steps.

    In the first tenth of them the norms are frozen BN. Then γ and β of GN are fitted, by least
    squares, to what BN put out in these steps, and the part of GN rises in each step, up to 1. In
    the end the norms are plain GN, and fused. Checkpoints have the weights of GN; while the
    hand-over lasts, they have BN, and the sums for the fit, as the state of this hook.

    Args:
        model: whose norms are handed over: one built with MODEL.GN.HAND_OVER_STEPS, in a
            DistributedDataParallel or not.
        steps: that the hand-over takes.

    Raises:
        InputError: there are no norms to hand over, no values of BN to begin with, or none in the
            checkpoint that training goes on from, a stage is frozen, or values are not finite.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.steps = steps
        self.fitting_steps = max(1, steps // 10)
        self._began = False
        self._sums: dict[str, Tensor] = {}  # of the steps so far; none once γ, β are fitted
        self._step: dict[str, Tensor] = {}  # of this step, on this GPU
        self._watched: list[RemovableHandle] = []
        if not any(hand_overs(self.model)):
            raise InputError(
                f"a hand-over in {steps} steps changes nothing: no norm of the model was built for "
                "it, by MODEL.GN.HAND_OVER_STEPS or hand_over=True of gn_det's classes"
            )

    def before_train(self) -> None:
        if self.trainer.iter >= self.steps:
            self._finish()
            return
        if self.steps > self.trainer.max_iter:
            logging.getLogger(__name__).warning(
                f"this training ends at step {self.trainer.max_iter}, in the middle of a hand-over "
                f"in {self.steps} steps: its norms are no GN then, and checkpoints hold GN alone"
            )
        if not self._began:
            self._check_start()
            for name, norm in hand_overs(self.model):
                norm.begin()
                self._sums[name] = torch.zeros(
                    6, norm.num_channels, dtype=torch.float64, device=norm.weight.device
                )
            self._began = True
        for name in self._sums:
            norm = self.model.get_submodule(name)
            self._watched.append(norm.register_forward_pre_hook(partial(_watch, self._step, name)))

    def before_step(self) -> None:
        since_fit = self.trainer.iter - self.fitting_steps
        if since_fit >= 0:
            self._fit()
        self._step.update((name, torch.zeros_like(sums)) for name, sums in self._sums.items())
        for _, norm in hand_overs(self.model):
            norm.alpha = max(since_fit, 0) / max(self.steps - self.fitting_steps, 1)

    def after_step(self) -> None:
        for name, sums in self._step.items():
            if comm.get_world_size() > 1:
                dist.all_reduce(sums)
            self._sums[name] += sums
        if self.trainer.iter + 1 == self.steps:
            self._finish()

    def after_train(self) -> None:
        self._stop_watching()

    def _check_start(self) -> None:
        """Refuse what has no values of a trained BN, and warn of what may have none."""
        if self.trainer.iter > 0:
            raise InputError(
                "the checkpoint has no frozen BN to hand over from: the run began without "
                "MODEL.GN.HAND_OVER_STEPS"
            )
        norms = dict(hand_overs(self.model))
        if not any(norm.has_values_of_bn() for norm in norms.values()):
            raise InputError(
                "MODEL.GN.HAND_OVER_STEPS is set, and the norms have no values of a trained "
                "BN to begin with: set MODEL.WEIGHTS or MODEL.TIMM.WEIGHTS"
            )
        of_gn = [name for name, norm in norms.items() if norm.is_of_gn]
        if of_gn:
            raise InputError(
                f"MODEL.GN.HAND_OVER_STEPS is set, and the weights have no statistics of BN "
                f"for {len(of_gn)} of {len(norms)} norms ({shortened(of_gn, 3)}), like weights "
                "with GN; name weights with BN, or set HAND_OVER_STEPS to 0"
            )
        unknown = [n for n, x in norms.items() if x.lacks_statistics and x.is_of_gn is None]
        if unknown:
            logging.getLogger(__name__).warning(
                f"the weights have no statistics of BN for {len(unknown)} of {len(norms)} "
                f"norms ({shortened(unknown, 3)}). That is right for FAIR's files with BN, such as "
                "MSRA/R-50.pkl, which have it folded. Weights with GN cannot be handed over: "
                "set MODEL.GN.HAND_OVER_STEPS to 0 for these"
            )

    def _stop_watching(self) -> None:
        for handle in self._watched:
            handle.remove()
        self._watched = []

    def _fit(self) -> None:
        """Set γ, β of GN, once."""
        self._stop_watching()
        unseen = []
        for name, sums in self._sums.items():
            norm, fit = self.model.get_submodule(name), ChannelFit(sums)
            if not sums.isfinite().all():
                raise InputError(f"{name}: its input was not finite before the hand-over to GN")
            if fit.count:
                fit.set(norm)
            else:
                unseen.append(name)
        if unseen:
            logging.getLogger(__name__).warning(
                f"{len(unseen)} of {len(self._sums)} norms had no input in the first "
                f"{self.fitting_steps} steps ({shortened(unseen, 3)}), and become GN with γ and "
                "β of BN"
            )
        self._sums = {}
        self._step.clear()

    def _finish(self) -> None:
        if any(hand_overs(self.model)):
            self._fit()
            finish(self.model)
            fuse(self.model)

    def state_dict(self) -> dict[str, Any]:
        if not self._began or not any(hand_overs(self.model)):
            return {}
        return {
            "bn": {name: norm.bn() for name, norm in hand_overs(self.model)},
            "sums": self._sums,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        norms = dict(hand_overs(self.model))
        if state_dict.keys() != {"bn", "sums"}:
            raise InputError(
                "the checkpoint is of a hand-over by another version of gn_det, which begins anew"
            )
        if norms.keys() != state_dict["bn"].keys():
            raise InputError(
                f"the checkpoint hands over {len(state_dict['bn'])} norms, and the model has "
                f"{len(norms)} to hand over"
            )
        for name, norm in norms.items():
            norm.set_bn(state_dict["bn"][name])
        for name, sums in state_dict["sums"].items():
            self._sums[name] = sums.to(norms[name].weight.device)
        self._began = True


# No method of the hook, since copies and pickles of the model have what watches it.
@torch.no_grad()
def _watch(step: dict[str, Tensor], name: str, norm: HandOver, args: tuple[Tensor, ...]) -> None:
    x = args[0]
    if not norm.training or not x.numel():
        return
    if not (norm.weight.requires_grad or x.requires_grad):
        raise InputError(
            f"{name} is frozen, would become GN, and what feeds it could not adapt: a "
            "hand-over needs MODEL.BACKBONE.FREEZE_AT 0"
        )
    step[name] += sums_of_gn(x, norm.num_groups, norm.eps, norm.bn_of(x))
