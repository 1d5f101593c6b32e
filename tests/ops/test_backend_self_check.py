"""At first use on a device the kernels are held to the reference, and turned off if they differ."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext

import pytest
import torch
from support.kernels import DTYPES
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gn_det.errors import InputError
from gn_det.ops import aten, group_norm, guarded, self_check
from gn_det.ops.form import Form
from gn_det.ops.kernels import launch

CPU, CARD = torch.device("cpu"), torch.device("meta")  # a card is any that is not the CPU


pytestmark = pytest.mark.usefixtures("as_on_a_new_process")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None], list[str]]:
    """ATen computes what kernels would, one result of it spoilt; the list names what was run."""

    def standing_in(spoilt: str | None = None) -> list[str]:
        ran: list[str] = []

        def spoil(name: str, tensor: torch.Tensor | None) -> None:
            ran.append(name)
            if name == spoilt:
                tensor[(0,) * tensor.dim()] += 1.0

        def forward(inputs: launch.Inputs, num_groups: int, eps: float, form: Form) -> tuple:
            y, statistics = aten.forward(inputs, num_groups, eps, form)
            spoil("y", y)
            return y, statistics, []

        def backward(inputs: launch.Inputs, *rest: object) -> tuple:
            results = aten.backward(inputs, *rest)
            for name, result in zip(("dx", "dresidual", "dparameters"), results, strict=True):
                if result is not None:
                    spoil(name, result)
            return *results, []

        monkeypatch.setattr(launch, "forward_launches", forward)
        monkeypatch.setattr(launch, "backward_launches", backward)
        monkeypatch.setattr(launch, "run", lambda launches, device: None)
        return ran

    return standing_in


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_results_pass_in_every_dtype(dtype: torch.dtype, stand_in: Callable) -> None:
    ran = stand_in()
    assert self_check.find_mismatch(CPU, dtype) is None
    assert {"y", "dx", "dresidual", "dparameters"} <= set(ran)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spoilt", ["y", "dx", "dresidual", "dparameters"])
def test_a_wrong_value_is_told_beside_the_right_one(
    spoilt: str, dtype: torch.dtype, stand_in: Callable
) -> None:
    stand_in(spoilt)
    words = r" of GN.* on \d.* is -?[\d.e-]+ where the reference has -?[\d.e-]+$"
    found = self_check.find_mismatch(CPU, dtype)
    assert re.search(words, found), found


def test_nan_is_a_mismatch_too(stand_in: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in()
    right = launch.forward_launches

    def nan(*arguments: object) -> tuple:
        y, *rest = right(*arguments)
        return y * torch.nan, *rest

    monkeypatch.setattr(launch, "forward_launches", nan)
    assert "is nan where the reference has" in self_check.find_mismatch(CPU, torch.float32)


@pytest.fixture
def mismatches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """A self-check that finds the kernels wrong; the list has its calls."""
    calls: list[tuple] = []

    def find(*arguments: object) -> str:
        calls.append(arguments)
        return "y of GN on 1×2 is 3 where the reference has 4"

    monkeypatch.setattr(guarded, "find_mismatch", find)
    return calls


def test_a_mismatch_turns_the_kernels_off_with_one_warning(mismatches: list) -> None:
    with pytest.warns(UserWarning) as said:
        assert not any(guarded.kernels_work(CARD, torch.float32) for _ in range(3))
    (text,) = [str(warning.message) for warning in said]
    assert text == (
        "group_norm on meta in float32 runs on ATen's operators, not on its fused kernels: they "
        "compute something else: y of GN on 1×2 is 3 where the reference has 4; please report "
        "this with the card"
    )
    assert len(mismatches) == 1


def test_a_mismatch_is_an_error_where_the_kernels_are_insisted_on(
    mismatches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GN_DET_BACKEND", "triton")
    for _ in range(2):
        with pytest.raises(InputError, match="=triton, but .* is 3 where the reference has 4"):
            guarded.kernels_work(CARD, torch.float32)
    assert len(mismatches) == 1


def test_the_check_runs_once_for_each_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []
    monkeypatch.setattr(guarded, "find_mismatch", lambda *arguments: calls.append(arguments))
    cards = [torch.device("cuda", 0), torch.device("cuda", 1)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for _ in range(3):
        for card in cards:
            for dtype in (torch.float32, torch.bfloat16):
                assert guarded.kernels_work(card, dtype)
    assert len(calls) == len(set(calls)) == 4


@pytest.mark.parametrize(("choice", "checks"), [("0", 0), ("1", 1), (None, 1)])
def test_the_environment_skips_the_check(
    choice: str | None, checks: int, mismatches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    if choice is not None:
        monkeypatch.setenv("GN_DET_SELF_CHECK", choice)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert guarded.kernels_work(CARD, torch.float32) is (checks == 0)
    assert len(mismatches) == checks


@pytest.mark.parametrize("choice", ["no", "", "2"])
def test_another_choice_is_refused(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GN_DET_SELF_CHECK", choice)
    with pytest.raises(InputError, match=f"^GN_DET_SELF_CHECK={choice}: choose 0 or 1$"):
        guarded.kernels_work(CARD, torch.float32)


def test_during_the_capture_of_a_cuda_graph_nothing_is_checked(
    mismatches: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert guarded.kernels_work(torch.device("cuda", 0), torch.float32)
    assert not mismatches and not guarded._verdicts


class _Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


AROUND = {
    "nothing": nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "hooks on saved tensors": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: pytest.fail("a hook saw a tensor of the check"), lambda tensor: tensor
    ),
    "a fake mode": torch._subclasses.FakeTensorMode,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_what_the_caller_has_set_does_not_reach_the_check(
    around: Callable, stand_in: Callable
) -> None:
    stand_in()
    state = torch.get_rng_state()
    with around():
        assert self_check.find_mismatch(CPU, torch.float32) is None
    assert torch.equal(state, torch.get_rng_state())


def test_no_dispatch_mode_and_no_transform_of_the_caller_sees_the_check(stand_in: Callable) -> None:
    stand_in()
    with _Watching() as watching:
        assert self_check.find_mismatch(CPU, torch.float32) is None
    assert not watching.seen

    def function(x: torch.Tensor) -> torch.Tensor:
        assert self_check.find_mismatch(CPU, torch.float32) is None
        return x.sum()

    torch.func.grad(torch.func.grad(function))(torch.tensor(1.0))
    torch.func.vmap(function)(torch.ones(2, 3))


def test_the_check_may_come_first_inside_a_checkpoint(
    stand_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in()
    monkeypatch.setattr(guarded, "_find_fault", lambda *card: self_check.find_mismatch(*card))
    module = importlib.import_module("gn_det.ops.group_norm")
    monkeypatch.setattr(module, "kernels_run_on", lambda device_type: True)
    monkeypatch.setattr(module, "is_eager", lambda: False)  # through what stands in
    x = torch.randn(2, 6, 5, 7, requires_grad=True)
    y = checkpoint(lambda x: group_norm(x, 3, activation="relu"), x, use_reentrant=False)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(torch.nn.functional.group_norm(x, 3).relu().square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    assert list(guarded._verdicts.values()) == [None]


def test_the_check_holds_in_any_default_dtype(stand_in: Callable) -> None:
    stand_in()
    with ExitStack() as stack:
        torch.set_default_dtype(torch.float64)
        stack.callback(torch.set_default_dtype, torch.float32)
        assert self_check.find_mismatch(CPU, torch.float32) is None
