"""The signals by which schedulers and closed terminals end a job: save a checkpoint and exit."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from gn_det.checkpoint import Checkpointer

__all__ = ["ENDING", "TERMINATED", "TerminationHook"]

ENDING = (signal.SIGTERM, signal.SIGHUP)

# What a shell reports of a program that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM


class TerminationHook(HookBase):
    """Ends training after the step in which any process got SIGTERM or SIGHUP, with a checkpoint.

    SIGTERM aborts an evaluation; the resumed run skips it.

    Args:
        checkpointer: of the run, also with the trainer's state.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._requested = False
        self._at_once = False

    def before_train(self) -> None:
        self._process = os.getpid()
        self._before = {number: signal.signal(number, self._on_signal) for number in ENDING}

    def after_step(self) -> None:
        if any(comm.all_gather(self._requested)):
            self._requested = True
            self._save()
            comm.synchronize()  # where one process ends, the others are ended soon
            self._exit()

    def release(self) -> None:
        """Give the signals back to who handled them before, after the last evaluation."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def evaluating(self, evaluate: Callable[[], Any]) -> Any:
        """Evaluate, but let SIGTERM end the process at once."""
        if self._requested:
            self._save()
            self._exit()
        self._at_once = True
        try:
            return evaluate()
        finally:
            self._at_once = False

    def _on_signal(self, number: int, frame: Any) -> None:
        del number, frame
        if os.getpid() != self._process:  # a loading process that has just been forked
            return
        self._requested = True
        if self._at_once:
            self._at_once = False
            self._save()
            self._warn()
            sys.stdout.flush()
            sys.stderr.flush()
            # Python ignores what is raised in some callbacks, as in those of a fork. Loading
            # processes end with this one.
            os._exit(TERMINATED)

    def _save(self) -> None:
        iteration = self.trainer.iter
        done = iteration >= self.trainer.max_iter - 1  # model_final.pth has it
        if comm.is_main_process() and not done:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)

    def _exit(self) -> None:
        self._warn()
        sys.exit(TERMINATED)

    def _warn(self) -> None:
        logging.getLogger(__name__).warning("SIGTERM: training ends here, and can be resumed")
