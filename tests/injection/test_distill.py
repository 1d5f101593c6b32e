"""distill: what it learns, what it leaves alone, and that a break changes nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gn_det
from gn_det import InputError
from gn_det.injection.features import level_errors


class Small(nn.Module):
    """Two levels, with BN of statistics that are not those of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.dropout = nn.Dropout(0.5)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        return {"one": x, "two": self.dropout(self.second(x))}


def networks() -> tuple[nn.Module, nn.Module]:
    """A converted network, and that with BN."""
    torch.manual_seed(0)
    teacher = Small()
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    student = copy.deepcopy(teacher)
    gn_det.inject(student, num_groups=2)  # γ, β copied: not what a fit would find
    return student, teacher


def batches(number: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 12, 12, generator=generator) for _ in range(number)]


def test_every_level_comes_closer_also_on_pictures_that_were_held_out() -> None:
    student, teacher = networks()
    held_out = batches(5)[3:]
    found = gn_det.distill(student, teacher, batches(), steps=150, lr=3e-3, held_out=held_out)
    assert set(found.before) == {"one", "two"} and len(found.losses) == 150
    assert all(found.after[level] < 0.9 * error for level, error in found.before.items())
    assert found.after == level_errors(student, teacher, held_out, lambda model, x: model(x))
    assert "distilled" in str(found) and "one" in found.to_markdown()


def test_the_error_is_that_of_numpy() -> None:
    student, teacher = networks()
    found = level_errors(student, teacher, batches(), lambda model, x: model(x))
    student.eval(), teacher.eval()
    ours, theirs = (torch.cat([model(x)["two"] for x in batches()]) for model in (student, teacher))
    mean = theirs.mean((0, 2, 3), keepdim=True)
    assert found["two"] == pytest.approx(((ours - theirs).norm() / (theirs - mean).norm()).item())


@pytest.mark.parametrize("stops_after", [1, 7, 19, 20])
def test_a_break_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops_after: int
) -> None:
    whole, teacher = networks()
    found = gn_det.distill(whole, teacher, batches(), steps=20)
    student, _ = networks()
    file = tmp_path / "distillation.pth"
    calls = 0

    def breaks(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += (
            model is student and model.first[0].weight.requires_grad and torch.is_grad_enabled()
        )
        if calls > stops_after:
            raise KeyboardInterrupt
        return model(x)

    if stops_after < 20:
        with pytest.raises(KeyboardInterrupt):
            gn_det.distill(student, teacher, batches(), steps=20, checkpoint=file, call=breaks)
        fresh, _ = networks()
        assert all(map(torch.equal, student.state_dict().values(), fresh.state_dict().values()))
    again = gn_det.distill(student, teacher, batches(), steps=20, checkpoint=file)
    assert again == found
    assert all(map(torch.equal, student.state_dict().values(), whole.state_dict().values()))


def test_an_iterable_is_gone_through_again_and_continued_where_it_was(tmp_path: Path) -> None:
    class Loader:
        def __iter__(self) -> object:
            return iter(batches())

    (whole, teacher), (student, _) = networks(), networks()
    a = gn_det.distill(whole, teacher, batches(), steps=8)
    b = gn_det.distill(student, teacher, Loader(), steps=8)
    assert a.losses == b.losses


def test_a_state_that_is_no_tensor_stays() -> None:
    class Versioned(Small):
        def get_extra_state(self) -> dict:
            return {"version": 1}

        def set_extra_state(self, state: dict) -> None:
            assert state == {"version": 1}

    teacher = Versioned()
    student = gn_det.inject(copy.deepcopy(teacher), num_groups=2)
    assert len(gn_det.distill(student, teacher, batches(), steps=1).losses) == 1


def test_held_out_batches_can_be_a_tensor() -> None:
    student, teacher = networks()
    held_out = torch.stack(batches(2))
    found = gn_det.distill(student, teacher, batches(), steps=1, held_out=held_out)
    assert found.after == level_errors(student, teacher, held_out, lambda model, x: model(x))


def test_it_learns_under_inference_mode() -> None:
    (student, teacher), (same, _) = networks(), networks()
    given = batches()
    with torch.inference_mode():
        found = gn_det.distill(student, teacher, given, steps=3)
    assert found.losses == gn_det.distill(same, teacher, given, steps=3).losses


def test_a_network_that_is_its_own_teacher_learns_nothing() -> None:
    student, _ = networks()
    with pytest.raises(InputError, match="the student is the teacher"):
        gn_det.distill(student, student, batches(), steps=1)


def test_modes_and_what_trains_stay() -> None:
    student, teacher = networks()
    student.train()
    teacher.second.train()
    student.first.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    weight = student.first[0].weight.detach().clone()
    gn_det.distill(student, teacher, batches(), steps=2)
    assert not torch.equal(student.first[0].weight, weight)  # frozen layers learn here
    assert not any(p.requires_grad for p in student.first.parameters())
    assert all(p.requires_grad and p.grad is None for p in student.second.parameters())
    assert student.training and student.dropout.training and teacher.second.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    "features",
    [
        lambda model, x: model(x)["two"],
        lambda model, x: list(model(x).values()),
        lambda model, x: model(x)["two"].mean((2, 3)),
    ],
    ids=["a tensor", "a list", "vectors"],
)
def test_features_of_every_form(features: Callable) -> None:
    student, teacher = networks()
    found = gn_det.distill(student, teacher, batches(), steps=60, lr=3e-3, call=features)
    assert sum(found.after.values()) < sum(found.before.values())


class KeepsForEval(nn.Module):
    """Computes its bias once for eval mode, as transformers of timm and LeViT do."""

    def __init__(self, deletes: bool) -> None:
        super().__init__()
        self.bias, self.deletes = nn.Parameter(torch.zeros(8)), deletes
        self.train()

    def train(self, mode: bool = True) -> KeepsForEval:
        super().train(mode)
        if not mode:
            self.kept = 2 * self.bias
        elif self.deletes and hasattr(self, "kept"):
            del self.kept
        return self

    def forward(self, x: Tensor) -> Tensor:
        bias = 2 * self.bias if self.training else self.kept
        return x + bias.view(1, -1, 1, 1)


@pytest.mark.parametrize("deletes", [True, False])
@pytest.mark.parametrize("mode", [True, False])
def test_what_a_module_keeps_for_eval_mode_learns_too(deletes: bool, mode: bool) -> None:
    student, teacher = (nn.Sequential(nn.Conv2d(3, 8, 1), KeepsForEval(deletes)) for _ in range(2))
    student[0].load_state_dict(teacher[0].state_dict())
    nn.init.normal_(teacher[1].bias)
    for network in (student, teacher):
        network.train(mode)
    found = gn_det.distill(student, teacher, batches(), steps=40, lr=0.1)
    assert found.after["output"] < 0.3 * found.before["output"]
    x = batches()[0]
    learnt = student[1].bias.detach().view(1, -1, 1, 1)
    torch.testing.assert_close(student(x), student[0](x) + 2 * learnt)


def test_a_network_that_was_nearer_before_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    student, teacher = networks()
    found = gn_det.distill(student, teacher, batches(), steps=1, lr=10.0)
    worse = [name for name, error in found.after.items() if error > found.before[name]]
    assert worse and f"the errors of {len(worse)} of {len(found.after)} levels" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [(torch.rand(2, 3, 12, 12), 1)],
            r"fails on a batch, a tuple: .* call=lambda model, batch",
        ),
        ([{"pixels": torch.rand(2, 3, 12, 12)}], "a batch, a dict"),
        (torch.rand(2, 3, 12, 12), r"a batch, a \(3, 12, 12\) tensor of float32: "),
        ([torch.zeros(2, 3, 12, 12, dtype=torch.uint8)], "tensor of uint8"),
    ],
)
def test_a_batch_that_is_no_input_is_told(given: object, message: str) -> None:
    student, teacher = networks()
    with pytest.raises(InputError, match=message):
        gn_det.distill(student, teacher, given, steps=1)
    with pytest.raises(InputError, match=message):
        gn_det.convert_bn(teacher, given)


def test_progress_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        gn_det.distill(*networks(), batches(), steps=20)
    assert "step 20 of 20, loss " in caplog.text and "s to go" in caplog.text


def _another_level_with_bn(model: nn.Module, x: Tensor) -> Tensor:
    has_bn = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    return model(x)["one" if has_bn else "two"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps 0"), ({"steps": 2.5}, "steps 2.5"),
        ({"lr": 0.0}, "lr 0.0"), ({"lr": float("nan")}, "lr nan"), ({"lr": "1e-3"}, "lr '1e-3'"),
        ({"batches": None}, "a NoneType cannot be read so; give a list"),
        ({"batches": []}, "no batches"),
        ({"batches": iter(batches())}, "cannot be read so"),
        ({"call": _another_level_with_bn}, "the student gives feature maps"),
        ({"call": lambda model, x: model(x)["two"] * float("nan")}, "output is not finite"),
        ({"call": lambda model, x: model(x[:1])["two"].mean((2, 3))}, "one value for each channel"),
        ({"call": lambda model, x: [model(x)["two"], None]}, "gives a NoneType as 1"),
        ({"call": lambda model, x: {"boxes": [model(x)["two"]]}}, "gives a list as boxes"),
        ({"call": lambda model, x: model(x)["two"].detach()}, "gives output without a gradient"),
        ({"call": torch.no_grad()(lambda model, x: model(x))}, "gives one, two without a gradient"),
        ({"call": lambda model, x: [model(x)["two"], model(x)["one"] > 0]}, "gives 1 without a"),
    ],
)  # fmt: skip
def test_what_cannot_be_distilled_is_one_line(options: dict, message: str) -> None:
    student, teacher = networks()
    before = copy.deepcopy(student.state_dict())
    arguments = {"batches": batches(), "steps": 3, **options}
    with pytest.raises(InputError, match=message):
        gn_det.distill(student, teacher, **arguments)
    assert all(map(torch.equal, student.state_dict().values(), before.values()))


@pytest.mark.parametrize(
    "change",
    [
        "other steps", "no archive", "another network", "other groups", "another teacher",
        "another start", "another call", "other names", "other held-out batches", "no optimizer",
    ],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, change: str) -> None:
    student, teacher = networks()
    file = tmp_path / "distillation.pth"
    gn_det.distill(student, teacher, batches(), steps=2, checkpoint=file)
    if change == "no archive":
        file.write_bytes(b"no archive")
    if change == "another network":
        state = torch.load(file, weights_only=True)
        state["student"].popitem()
        torch.save(state, file)
    if change == "no optimizer":
        state = torch.load(file, weights_only=True)
        state["optimizer"]["param_groups"] = 3
        torch.save(state, file)
    if change == "other groups":
        student = gn_det.inject(copy.deepcopy(teacher), num_groups=1)
    if change == "another teacher":
        next(teacher.parameters()).data.add_(1)
    options = {}
    if change == "another start":
        next(student.parameters()).data.mul_(1.5)
    if change == "another call":
        options["call"] = lambda model, x: {"one": model(x)["two"], "two": model(x)["one"]}
    if change == "other names":
        options["call"] = lambda model, x: {"three": model(x)["two"]}
    if change == "other held-out batches":
        options["held_out"] = [3 * x for x in batches()]
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(InputError, match=r"distillation\.pth"):
        steps = 3 if change == "other steps" else 2
        gn_det.distill(student, teacher, batches(), steps=steps, checkpoint=file, **options)
    assert all(map(torch.equal, student.state_dict().values(), before.values()))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, OSError])
@pytest.mark.parametrize("place", ["torch.load", "torch.optim.AdamW.load_state_dict"])
def test_memory_that_runs_out_says_nothing_against_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, error: type[Exception]
) -> None:
    student, teacher = networks()
    file = tmp_path / "distillation.pth"
    gn_det.distill(student, teacher, batches(), steps=2, checkpoint=file)

    def runs_out(*args: Any, **kwargs: Any) -> None:
        raise error("no memory")

    monkeypatch.setattr(place, runs_out)
    with pytest.raises(error, match="no memory"):
        gn_det.distill(networks()[0], teacher, batches(), steps=2, checkpoint=file)
    assert file.exists()


def test_networks_that_are_equal_or_swapped_are_told() -> None:
    student, teacher = networks()
    with pytest.raises(InputError, match="gives the features of the teacher already; copy"):
        gn_det.distill(student, copy.deepcopy(student), batches(), steps=1)
    with pytest.raises(InputError, match="the student has BN, and the teacher has none"):
        gn_det.distill(teacher, student, batches(), steps=1)


def test_networks_that_share_tensors_are_told_before_the_teacher_changes() -> None:
    student, teacher = networks()
    teacher.second = student.second
    before = copy.deepcopy(teacher.state_dict())
    with pytest.raises(InputError, match=r"share 4 parameters or .*\(second.0.weight,.*deepcopy"):
        gn_det.distill(student, teacher, batches(), steps=1)
    assert all(map(torch.equal, teacher.state_dict().values(), before.values()))


@pytest.mark.parametrize("lr", [1e-3, np.float64(1e-3), np.float32(1e-3)])
@pytest.mark.parametrize("steps", [6, np.int64(6), np.int32(6)])
def test_numbers_of_numpy_can_be_continued_as_well(steps: int, lr: float, tmp_path: Path) -> None:
    calls = count()

    def stops(model: nn.Module, x: Tensor) -> Tensor:
        if next(calls) > 12:
            raise KeyboardInterrupt
        return model(x)

    file = tmp_path / "new" / "folder" / "distillation.pth"
    with pytest.raises(KeyboardInterrupt):
        gn_det.distill(*networks(), batches(), steps=steps, lr=lr, checkpoint=file, call=stops)
    assert file.exists()
    student, teacher = networks()
    found = gn_det.distill(student, teacher, batches(), steps=steps, lr=lr, checkpoint=file)
    again, teacher = networks()
    assert found.losses == gn_det.distill(again, teacher, batches(), steps=6, lr=float(lr)).losses


@pytest.mark.parametrize(
    ("number", "held_out", "message"),
    [
        (2, batches(4)[3:], "step 2: the loss is nan; the teacher's features are not finite"),
        (0, (), "the teacher's one is not finite on the held-out batches"),
    ],
)
def test_a_batch_that_is_not_finite_is_told(number: int, held_out: list, message: str) -> None:
    given = batches()
    given[number][0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=message):
        gn_det.distill(*networks(), given, steps=4, held_out=held_out)
