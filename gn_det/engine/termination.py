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

__all__ = ["TERMINATED", "TerminationHook", "catch_ending", "release_ending"]

Handlers = dict[int, Any]

# What a shell reports of a program that SIGTERM ended.
TERMINATED = 128 + signal.SIGTERM


def catch_ending(handler: Callable[[int, Any], None]) -> Handlers:
    """Handle SIGTERM and SIGHUP, but one that is ignored, as SIGHUP under nohup.

    Returns:
        The handlers before, for :func:`release_ending`.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    caught = [n for n in numbers if signal.getsignal(n) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in caught}


def release_ending(before: Handlers) -> None:
    """Give the signals back to who handled them before."""
    for number, handler in before.items():
        signal.signal(number, handler)


class TerminationHook(HookBase):
    """Ends training after the step in which any process got SIGTERM or SIGHUP, with a checkpoint.

    Either aborts an evaluation; the resumed run skips it.

    Args:
        checkpointer: of the run, also with the trainer's state.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._requested = False
        self._at_once = False
        self._before: Handlers = {}
        self._process = os.getpid()

    def before_train(self) -> None:
        self._before = catch_ending(self._on_signal)

    def after_step(self) -> None:
        if any(comm.all_gather(self._requested)):
            self._requested = True
            self._save()
            comm.synchronize()  # where one process ends, the others are ended soon
            self._exit()

    def release(self) -> None:
        """Give the signals back to who handled them before, after the last evaluation."""
        release_ending(self._before)

    def evaluating(self, evaluate: Callable[[], Any]) -> Any:
        """Evaluate, but let SIGTERM or SIGHUP end the process at once."""
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
        logging.getLogger(__name__).warning("training ends here by a signal, and can be resumed")
