"""The hook that hands a model over from frozen BN to GN while it trains."""

from __future__ import annotations

from typing import Any

from detectron2.engine import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.errors import InputError
from gn_det.injection import fuse
from gn_det.layers.hand_over import finish, hand_overs

__all__ = ["HandOverHook"]


class HandOverHook(HookBase):
    """Raises the part of GN in each step, from 0 in the first to 1 after so many.

    Then the norms are plain GN, and fused. Checkpoints have the weights of GN; while the hand-over
    lasts, they have BN as the state of this hook.

    Args:
        model: whose norms are handed over: one built with MODEL.GN.HAND_OVER_STEPS, in a
            DistributedDataParallel or not.
        steps: that the hand-over takes.

    Raises:
        InputError: when training begins: the checkpoint that it goes on from has no BN.
    """

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model.module if isinstance(model, DistributedDataParallel) else model
        self.steps = steps
        self._began = False

    def before_train(self) -> None:
        if self.trainer.iter >= self.steps:
            self._finish()
        elif not self._began:
            if self.trainer.iter > 0:
                raise InputError(
                    "the checkpoint has no frozen BN to hand over from: the run began without "
                    "MODEL.GN.HAND_OVER_STEPS"
                )
            for _, norm in hand_overs(self.model):
                norm.begin()
            self._began = True

    def before_step(self) -> None:
        for _, norm in hand_overs(self.model):
            norm.alpha = self.trainer.iter / self.steps

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.steps:
            self._finish()

    def _finish(self) -> None:
        if any(hand_overs(self.model)):
            finish(self.model)
            fuse(self.model)

    def state_dict(self) -> dict[str, Any]:
        return {name: norm.bn() for name, norm in hand_overs(self.model)} if self._began else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        norms = dict(hand_overs(self.model))
        if norms.keys() != state_dict.keys():
            raise InputError(
                f"the checkpoint hands over {len(state_dict)} norms, and the model has "
                f"{len(norms)} to hand over"
            )
        for name, norm in norms.items():
            norm.set_bn(state_dict[name])
        self._began = True
