"""Training and validation error after each epoch, whatever interrupts the training."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

__all__ = ["EpochErrors"]


class EpochErrors(HookBase):
    """Writes ``error/train`` and ``error/val`` after each epoch, in percent.

    The errors, and what the epoch has so far, are in the checkpoints, and where a run was ended
    between an epoch and its evaluation, that is the first thing when it goes on.

    Args:
        steps: iterations of an epoch, in each of which the storage has ``batch_error``.
        evaluate: returns the validation error.

    Attributes:
        train, val: by epoch.
    """

    def __init__(self, steps: int, evaluate: Callable[[], float]) -> None:
        self.train: list[float] = []
        self.val: list[float] = []
        self._steps = steps
        self._evaluate = evaluate
        self._batches: list[float] = []

    def before_train(self) -> None:
        if len(self.val) < self.trainer.start_iter // self._steps:
            self._end_epoch()

    def after_step(self) -> None:
        self._batches.append(self.trainer.storage.history("batch_error").latest())
        if (self.trainer.iter + 1) % self._steps == 0:
            self._end_epoch()

    def _end_epoch(self) -> None:
        val = self._evaluate()
        train = statistics.mean(comm.all_gather(statistics.mean(self._batches)))
        self.val.append(val)
        self.train.append(train)
        self._batches = []
        errors = {"error/train": train, "error/val": val}
        self.trainer.storage.put_scalars(**errors, smoothing_hint=False)

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.train, "val": self.val, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train, self.val = [*state_dict["train"]], [*state_dict["val"]]
        self._batches = [*state_dict["batches"]]
