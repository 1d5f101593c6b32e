"""What a call costs the host: the stub takes the launches that a GPU would."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.kernels import make_inputs
from torch import Tensor
from triton.runtime.jit import JITFunction

from gn_det.ops import group_norm
from gn_det.ops.form import FORMS
from gn_det.ops.kernels import launch
from gn_det.studies.kernels.host import PASSES, StubDriver, call_rows, kernels_on_stub


@pytest.fixture
def driver() -> Iterator[StubDriver]:
    with kernels_on_stub() as driver:
        yield driver


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that Triton was asked to find for a launch, or to compile."""
    names = []
    run = JITFunction.run

    def counted(self: JITFunction, *args: object, **kwargs: object) -> object:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    return names


def passed(launches: list[tuple]) -> list[list]:
    """What launches were given: tensors by their kinds, numbers, and the types of all else."""

    def described(argument: object) -> object:
        if isinstance(argument, (tuple, list)):
            return [described(one) for one in argument]
        if isinstance(argument, Tensor):
            return argument.dtype, argument.shape, argument.stride()
        return argument if isinstance(argument, (int, float)) else type(argument)

    return [[described(argument) for argument in launch] for launch in launches]


# One pass in one run, one pass and its sums, split.
SHAPES = [(1, 64, 4, 4), (3, 64, 4, 4), (1, 64, 100, 80)]


@pytest.mark.parametrize("form", ["GN+ReLU", "GN+GN+add+ReLU"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_second_call_launches_the_same_without_asking_triton(
    shape: tuple, form: str, driver: StubDriver, asked: list[str]
) -> None:
    def call() -> list[list]:
        driver.utils.launches.clear()
        inputs = make_inputs(FORMS[form], shape, torch.device("cpu"))
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
        y = group_norm(
            **leaves, num_groups=32, activation="relu", normalize_residual=FORMS[form].normalize_add
        )
        torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
        return passed(driver.utils.launches)

    first = call()
    assert len(asked) == len(first) >= 2
    asked.clear()
    assert call() == first and not asked


def test_what_triton_would_compile_anew_is_left_to_triton(
    driver: StubDriver, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 64, 4, 4)
    aligned = torch.randn(shape)
    memory = torch.randn(aligned.numel() + 1)
    misaligned = memory[1:].view(shape)
    assert misaligned.data_ptr() % 16

    def asks(x: Tensor) -> bool:
        asked.clear()
        group_norm(x, 32)
        return bool(asked)

    assert asks(misaligned) and asks(misaligned)
    assert asks(aligned) and not asks(aligned)
    assert asks(misaligned) and not asks(aligned)
    assert asks(aligned.bfloat16()) and not asks(aligned.bfloat16())
    monkeypatch.setattr(launch, "_DIRECT", False)  # a version of Triton that nobody has seen
    assert asks(aligned.half()) and asks(aligned.half())


ALLOCATIONS_AND_VIEWS = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
    *("aten::unbind", "aten::select", "aten::as_strided", "aten::detach", "detach"),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_known_call_reads_and_copies_nothing_and_can_be_captured_in_a_graph(
    shape: tuple, driver: StubDriver
) -> None:
    inputs = make_inputs(FORMS["GN+GN+add+ReLU"], shape, torch.device("cpu"))
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    dy = torch.ones(shape)

    def call() -> None:
        y = group_norm(**leaves, num_groups=32, activation="relu", normalize_residual=True)
        torch.autograd.grad(y, list(leaves.values()), dy)

    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = {event.name for event in profile.events() if event.name.startswith("aten::")}
    assert "aten::empty_like" in names and names <= ALLOCATIONS_AND_VIEWS


def test_rows_hold_times_of_both_and_their_ratios() -> None:
    rows = call_rows(("GN+ReLU",), rounds=1)
    assert [row["pass"] for row in rows] == list(PASSES)
    for row in rows:
        for name in ("no launches", "to the driver"):
            assert row[f"{name} / ATen"] == pytest.approx(row[f"{name} µs"] / row["ATen µs"])
