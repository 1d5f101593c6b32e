"""SIGTERM during steps and evaluations."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from detectron2.engine import SimpleTrainer, hooks
from detectron2.engine.train_loop import HookBase
from torch import nn

from gn_det.checkpoint import Checkpointer
from gn_det.engine.termination import TerminationHook


class At(HookBase):
    """Sends SIGTERM to this process in a step."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            os.kill(os.getpid(), signal.SIGTERM)


class Model(nn.Linear):
    """One weight, and its product with the batch as the loss."""

    def forward(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": super().forward(batch).sum()}


def train(
    folder: Path, iterations: int, period: int, evaluate: Callable, *before: HookBase
) -> Checkpointer:
    model = Model(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [torch.ones(1, 1)] * iterations, optimizer)
    checkpointer = Checkpointer(model, str(folder), trainer=trainer)
    termination = TerminationHook(checkpointer)
    evaluation = hooks.EvalHook(period, lambda: termination.evaluating(evaluate))
    trainer.register_hooks([*before, termination, evaluation])
    try:
        trainer.train(0, iterations)
    finally:
        termination.release()
    return checkpointer


def terminate() -> dict:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("SIGTERM did not end the evaluation")


def test_the_step_is_finished_saved_and_the_status_is_143(tmp_path: Path) -> None:
    evaluations = []
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, 10, 0, lambda: evaluations.append(1), At(3))
    assert ended.value.code == 143
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    saved = torch.load(tmp_path / "model_0000003.pth", weights_only=True)
    assert saved["iteration"] == saved["trainer"]["iteration"] == 3 and not evaluations


def test_an_evaluation_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, 10, 4, terminate)
    assert ended.value.code == 143
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"


def test_sigterm_in_the_last_step_leaves_the_final_evaluation_to_the_resumed_run(
    tmp_path: Path,
) -> None:
    evaluations = []
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, 4, 0, lambda: evaluations.append(1), At(3))
    assert ended.value.code == 143 and not evaluations
    assert not list(tmp_path.iterdir())  # the final checkpoint is another hook's


def test_whoever_handled_sigterm_before_does_so_afterwards(tmp_path: Path) -> None:
    def mine(number: int, frame: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        train(tmp_path, 2, 1, dict)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_so_as_under_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path, 4, 0, dict, Hangup())
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class Hangup(HookBase):
    def before_step(self) -> None:
        os.kill(os.getpid(), signal.SIGHUP)
