"""The signals that end a program: Ctrl-C, SIGTERM of a scheduler, SIGHUP of a closed terminal.

The first ends what is going on in good order: a training saves a checkpoint. The second ends the
process at once. Processes that others start end with those, and leave the signals to them.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing import _prctl_pr_set_pdeathsig

from gn_det.checkpoint import Checkpointer

__all__ = [
    "ENDS_WITH_PARENT",
    "INTERRUPTED",
    "TERMINATED",
    "TerminationHook",
    "catch_ending",
    "end",
    "end_loading_processes",
    "end_with_parent",
    "release_ending",
    "say_ending",
    "starting_processes",
]

Handlers = dict[int, Any]

# What a shell reports of a program that SIGINT or SIGTERM ended.
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
_STATUS = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: TERMINATED,
    signal.SIGHUP: TERMINATED,
}

# In the environment of processes whose parent is a program of ours, which passes signals on.
ENDS_WITH_PARENT = "GN_DET_ENDS_WITH_PARENT"

_SECONDS_WITHOUT_PARENT = 8


def catch_ending(handler: Callable[[int], None]) -> Handlers:
    """Call handler with the exit status at the first of these signals; the second kills at once.

    A process with ENDS_WITH_PARENT, or of torchrun, may be sent each signal twice, by its parent
    and by a scheduler: there the first counts. A signal that is ignored stays so, as SIGHUP
    under nohup.

    Returns:
        The handlers before, for :func:`release_ending`.
    """
    process, parent = os.getpid(), os.getppid()
    led = ENDS_WITH_PARENT in os.environ or dist.is_torchelastic_launched()
    caught = [n for n in _STATUS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    handled = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal handled
        if os.getpid() != process:  # a loading process that has just been forked
            return
        if not led:
            for other in caught:
                signal.signal(other, signal.SIG_DFL)
        elif os.getppid() != parent:  # it was killed, and nobody waits
            signal.alarm(_SECONDS_WITHOUT_PARENT)
        if not handled:
            handled = True
            handler(_STATUS[number])

    return {number: signal.signal(number, on_signal) for number in caught}


def release_ending(before: Handlers) -> None:
    """Give the signals back to who handled them before."""
    for number, handler in before.items():
        signal.signal(number, handler)


def end(status: int, within: int = 0) -> None:
    """For :func:`catch_ending`: end this process in good order.

    Args:
        status: of the exit.
        within: seconds after which it ends by force; 0 for no limit.

    Raises:
        SystemExit: always.
    """
    say_ending(status)
    if within:
        # An exit may be stuck in a library, and what is raised in some callbacks is lost.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(status))
        signal.alarm(within)
    sys.exit(status)


def say_ending(status: int) -> None:
    """Write one line to stderr, also in the middle of another writing."""
    os.write(2, b"interrupted\n" if status == INTERRUPTED else b"terminated\n")


@contextmanager
def starting_processes() -> Iterator[None]:
    """Keep Ctrl-C and SIGHUP from processes that start within; their parent sends them SIGTERM."""
    resource_tracker.ensure_running()  # its start would give SIGINT back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int, number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent ends, and leave Ctrl-C to that.

    Args:
        parent: its process id; where it has ended already, this process does so now.
        number: of the signal.
    """
    os.environ[ENDS_WITH_PARENT] = "1"
    _prctl_pr_set_pdeathsig(number)
    if os.getppid() != parent:
        os._exit(TERMINATED)


def end_loading_processes() -> None:
    """Kill the loading processes that a failure has left, so that this process does not wait."""
    loading = [child for child in multiprocessing.active_children() if child.daemon]
    if loading:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's would raise
    for child in loading:
        child.kill()


class TerminationHook(HookBase):
    """Ends training with a checkpoint after the step in which any process got such a signal.

    It aborts an evaluation; the resumed run skips that.

    Args:
        checkpointer: of the run, also with the trainer's state.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self._checkpointer = checkpointer
        self._status = 0
        self._at_once = False
        self._before: Handlers = {}

    def before_train(self) -> None:
        self._before = catch_ending(self._request)

    def after_step(self) -> None:
        statuses = comm.all_gather(self._status)
        if any(statuses):
            self._status = max(statuses)
            self._save()
            comm.synchronize()  # where one process ends, the others are ended soon
            self._warn()
            sys.exit(self._status)

    def release(self) -> None:
        """Give the signals back to who handled them before, after the last evaluation."""
        release_ending(self._before)

    def evaluating(self, evaluate: Callable[[], Any]) -> Any:
        """Evaluate, but let a signal end the process at once."""
        if self._status:
            self._save()
            self._warn()
            sys.exit(self._status)
        self._at_once = True
        try:
            return evaluate()
        finally:
            self._at_once = False

    def _request(self, status: int) -> None:
        self._status = status
        if self._at_once:
            self._at_once = False
            self._save()
            self._warn()
            sys.stdout.flush()
            sys.stderr.flush()
            # Python ignores what is raised in some callbacks, as in those of a fork. Loading
            # processes end with this one.
            os._exit(status)

    def _save(self) -> None:
        iteration = self.trainer.iter
        done = iteration >= self.trainer.max_iter - 1  # model_final.pth has it
        if comm.is_main_process() and not done:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)

    def _warn(self) -> None:
        logging.getLogger(__name__).warning("training ends here by a signal, and can be resumed")
