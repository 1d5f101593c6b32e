"""fuse on modules of any class: what follows a norm is read from the forward that calls it."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import operator
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from support.following import called_alone
from support.models import computed, randomized
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gn_det import FusedGroupNorm, audit, fuse, inject, recompute, revert
from gn_det.injection.fuse import fused_forms, why_not_fused
from gn_det.layers import FusedGroupNormAct

C = 32


class Block(nn.Module):
    """A residual block, whose end is written in a function."""

    def __init__(self, end: Callable[[Block, Tensor, Tensor], Tensor], out: int = C) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(C, C, 3, padding=1), FusedGroupNorm(C)
        self.conv2, self.norm2 = nn.Conv2d(C, out, 1), FusedGroupNorm(out)
        self.shortcut = nn.Sequential(nn.Conv2d(C, out, 1), FusedGroupNorm(out))
        self.relu = nn.ReLU(inplace=True)
        self.gelu = nn.GELU()
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.norm1(self.conv1(x))))
        return self.end(self, y, x)


def block(end: Callable[[Any, Tensor, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return randomized(Block(end))


def forms_of(model: nn.Module) -> dict[str, str]:
    names = {module: name for name, module in model.named_modules()}
    return {names[norm]: str(form) for norm, form in fused_forms(model).items()}


def picture() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, C, 6, 7)


def assert_same_bits(before: nn.Module, after: nn.Module, x: Tensor | None = None) -> None:
    x = picture() if x is None else x
    for expected, actual in zip(computed(before, x), computed(after, x), strict=True):
        assert (expected is None and actual is None) or torch.equal(actual, expected)


def in_place_add(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


ENDS = {
    # Every spelling of ReLU and of addition.
    "relu module": (lambda m, y, x: m.relu(m.norm2(y)), "GN+ReLU"),
    "F.relu": (lambda m, y, x: F.relu(m.norm2(y)), "GN+ReLU"),
    "F.relu in place": (lambda m, y, x: F.relu(m.norm2(y), inplace=True), "GN+ReLU"),
    "F.relu_": (lambda m, y, x: F.relu_(m.norm2(y)), "GN+ReLU"),
    "torch.relu": (lambda m, y, x: torch.relu(m.norm2(y)), "GN+ReLU"),
    "torch.relu_": (lambda m, y, x: torch.relu_(m.norm2(y)), "GN+ReLU"),
    "Tensor.relu": (lambda m, y, x: m.norm2(y).relu(), "GN+ReLU"),
    "Tensor.relu_": (lambda m, y, x: m.norm2(y).relu_(), "GN+ReLU"),
    "+": (lambda m, y, x: m.norm2(y) + x, "GN+add"),
    "+ the other way": (lambda m, y, x: x + m.norm2(y), "GN+add"),
    "+=": (lambda m, y, x: in_place_add(m.norm2(y), x), "GN+add"),
    "operator.add": (lambda m, y, x: operator.add(m.norm2(y), x), "GN+add"),
    "torch.add": (lambda m, y, x: torch.add(m.norm2(y), x), "GN+add"),
    "torch.add by names": (lambda m, y, x: torch.add(input=m.norm2(y), other=x), "GN+add"),
    "Tensor.add": (lambda m, y, x: m.norm2(y).add(x), "GN+add"),
    "Tensor.add_": (lambda m, y, x: m.norm2(y).add_(x), "GN+add"),
    "+ and ReLU": (lambda m, y, x: m.relu(m.norm2(y) + x), "GN+add+ReLU"),
    "+= and ReLU": (lambda m, y, x: F.relu_(in_place_add(m.norm2(y), x)), "GN+add+ReLU"),
    "two norms": (lambda m, y, x: m.relu(m.norm2(y) + m.shortcut(x)), "GN+GN+add+ReLU"),
    "+= on the other norm": (
        lambda m, y, x: m.relu(in_place_add(m.shortcut(x), m.norm2(y))),
        "GN+GN+add+ReLU",
    ),
    "a shape is read": (
        lambda m, y, x: (lambda z: F.relu(z + F.interpolate(x, size=z.shape[2:])))(m.norm2(y)),
        "GN+add+ReLU",
    ),
    "broadcast": (lambda m, y, x: m.relu(m.norm2(y) + x.mean((2, 3), keepdim=True)), "GN+add+ReLU"),
    # What has to stay as it is.
    "GELU": (lambda m, y, x: m.gelu(m.norm2(y)), "GN"),
    "alpha": (lambda m, y, x: torch.add(m.norm2(y), x, alpha=2), "GN"),
    "a number": (lambda m, y, x: m.norm2(y) + 1, "GN"),
    "used twice": (lambda m, y, x: (lambda z: F.relu(z) + z)(m.norm2(y)), "GN"),
    "added to itself": (lambda m, y, x: (lambda z: z + z)(m.norm2(y)), "GN"),
    "ReLU in place, also seen elsewhere": (
        lambda m, y, x: (lambda z: (F.relu_(z), z)[1])(m.norm2(y)),
        "GN",
    ),
    "+= on a tensor of its own": (lambda m, y, x: in_place_add(x * 1, m.norm2(y)), "GN+add"),
    "the residual is changed first": (
        lambda m, y, x: (lambda z, r: (r.mul_(2), z + r)[1])(m.norm2(y), x * 1),
        "GN+add",
    ),
    "the residual is changed after": (
        lambda m, y, x: (lambda s, r: (F.relu(s), r)[0])(m.norm2(y) + x, x * 1),
        "GN+add+ReLU",
    ),
    "the norm's input is used between": (lambda m, y, x: m.norm2(y) + m.gelu(y), "GN"),
}


@pytest.mark.parametrize(("end", "form"), ENDS.values(), ids=ENDS)
def test_what_follows_a_norm_is_taken_in_whoever_wrote_it(end: Callable, form: str) -> None:
    model = block(end)
    fused = fuse(copy.deepcopy(model))
    assert forms_of(fused)["norm1"] == "GN+ReLU" and forms_of(fused)["norm2"] == form
    assert_same_bits(model, fused)
    assert list(fused.state_dict()) == list(model.state_dict())
    assert isinstance(fused, Block) and repr(fused) == repr(model)
    assert type(revert(fused)) is Block
    assert_same_bits(model, fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in ENDS if "+" in name or "add" in name])
def test_under_autocast_results_have_the_dtype_that_they_had(name: str, dtype: torch.dtype) -> None:
    model = block(ENDS[name][0])
    fused = fuse(copy.deepcopy(model))
    with torch.autocast("cpu", dtype), torch.no_grad():
        expected, actual = model(picture()), fused(picture())
    assert actual.dtype == expected.dtype
    # One rounding less, of a value of up to 4, where two norms are one call.
    torch.testing.assert_close(actual, expected, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_recomputed_gradients_are_the_same_bits() -> None:
    model = nn.Sequential(block(ENDS["two norms"][0]), block(ENDS["+ and ReLU"][0]))
    assert_same_bits(model, recompute(fuse(copy.deepcopy(model))))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = FusedGroupNorm(C), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.norm(x))


class Appends(Counts):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(1)
        return F.relu(self.norm(x)) * len(self.seen)


def forward_of(function: Callable) -> Callable[[], nn.Module]:
    """Builds a module with a norm, a dropout, and a forward that is a function of it."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.drop, self.flag = FusedGroupNorm(C), nn.Dropout(0.5), False
            self.register_buffer("count", torch.zeros(()))

        forward = function

    return Written


def without_gradients(self: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = F.relu(self.norm(x))
    return y + x


def without_autocast(self: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return F.relu(self.norm(x.float()))


def by_gradient_mode(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if torch.is_grad_enabled() else self.norm(x)


def by_data(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if x.mean() > 0 else self.norm(x)


def by_data_of_two(self: nn.Module, x: Tensor) -> Tensor:
    return self.two(x) if x.mean() > 0 else x


def by_type(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if isinstance(x, Tensor) else self.norm(x[0])


def by_chance(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if torch.rand(()).item() < 2 else x


def with_a_tensor_of_its_own(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) + torch.ones(1)


def by_length(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)) if len(x) > 1 else self.norm(x)


def by_count(self: nn.Module, x: Tensor) -> Tensor:
    return sum(F.relu(self.norm(x)) for _ in range(len(x)))


def asserting(test: Callable[[Tensor], bool]) -> Callable[[], nn.Module]:
    return forward_of(lambda self, x: F.relu(self.norm(x)) if test(x) else x)


def one_or_the_other(x: Tensor) -> bool:
    assert x.mean() > 9 or x.size(1) == C
    return True


def one_of_two(x: Tensor) -> bool:
    assert x.dim() in (3, 4)
    return True


def none_of_two(x: Tensor) -> bool:
    assert x.dim() not in (5, 6)
    return True


def unequal_lists(x: Tensor) -> bool:
    assert [x.dim()] != [5]
    return True


def any_of_them(x: Tensor) -> bool:
    assert any(size == C for size in (x.size(0), x.size(1)))
    return True


def unpacked(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x)).view(1, *x.shape)


def any_iterable(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(sum(x)[None]))


def by_own_dtype(self: nn.Module, x: Tensor) -> Tensor:
    return F.relu(self.norm(x.to(next(self.parameters()).dtype)))


def by_tracing(self: nn.Module, x: Tensor) -> Tensor:
    return self.norm(x) if torch.jit.is_tracing() else F.relu(self.norm(x))


class AppendsToDeque(Appends):
    def __init__(self) -> None:
        super().__init__()
        self.seen = deque()


LEFT = {
    "parameters": (forward_of(by_own_dtype), "asks for its parameters"),
    "is_tracing": (forward_of(by_tracing), "asks torch.jit.is_tracing"),
    "changes a deque": (AppendsToDeque, "changes seen"),
    "sets an attribute": (Counts, "sets calls"),
    "changes a list": (Appends, "changes seen"),
    "no_grad": (forward_of(without_gradients), "switches gradients off"),
    "autocast": (forward_of(without_autocast), "switches autocast"),
    "is_grad_enabled": (forward_of(by_gradient_mode), "asks torch.is_grad_enabled"),
    "data": (forward_of(by_data), "decides by the values"),
    "type": (forward_of(by_type), "asks what type"),
    "chance": (forward_of(by_chance), "draws random numbers"),
    "own tensor": (forward_of(with_a_tensor_of_its_own), "makes a tensor of its own"),
    "length": (forward_of(by_length), "decides by the values of tensors, or how many"),
    "counts": (forward_of(by_count), "counts by the values of tensors, or how many"),
    **{
        f"asserts {test.__name__}": (asserting(test), "decides by the values of tensors")
        for test in (one_or_the_other, one_of_two, none_of_two, unequal_lists, any_of_them)
    },
    "unpacks a shape": (forward_of(unpacked), "decides by the values of tensors, or how many"),
    "iterates": (forward_of(any_iterable), "decides by the values"),
}


@pytest.mark.parametrize(("build", "why"), LEFT.values(), ids=LEFT)
def test_a_forward_that_no_record_holds_for_is_left_and_nothing_has_changed(
    build: Callable[[], nn.Module], why: str
) -> None:
    model = build()
    before, state = {**vars(model)}, torch.get_rng_state()
    before = {name: copy.copy(value) for name, value in before.items()}
    with pytest.warns(UserWarning, match=f"none of the 1 norms .*{why}"):
        fuse(model)
    assert "unfused_kind" not in vars(type(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.__dict__.keys() == before.keys()
    assert all(vars(model)[name] == before[name] for name in before if name in ("calls", "seen"))


class TwoSums(nn.Module):
    """A norm that follows a sum which another norm takes in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = nn.Conv2d(C, C, 1), FusedGroupNorm(C), FusedGroupNorm(C)

    def forward(self, x: Tensor, before: Tensor | int) -> Tensor:
        y = F.relu(self.norm1(self.conv(x)) + before)
        return F.relu(self.norm2(y) + before)


@pytest.mark.parametrize("before", [0, 1.5, "x", "one pixel"])
def test_a_sum_may_be_of_a_number_and_behind_another_sum(before: float | str) -> None:
    model, x = TwoSums(), picture()
    other = {"x": x, "one pixel": x[:, :, :1, :1]}.get(before, before)
    expected = model(x, other)
    torch.testing.assert_close(fuse(model)(x, other), expected)


def test_torch_fx_traces_fused_blocks() -> None:
    model = block(lambda self, y, x: F.relu(self.norm2(y) + x))
    expected = model(picture())
    traced = torch.fx.symbolic_trace(fuse(model))
    torch.testing.assert_close(traced(picture()), expected)


def test_the_reason_is_that_of_the_forward_which_calls_a_norm() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = FusedGroupNorm(C), FusedGroupNorm(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sigmoid(self.first(x)))

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.two = Two()

        forward = by_data_of_two

    model = Holder()
    with pytest.warns(UserWarning, match="none of the 2 norms"):
        reasons = why_not_fused(fuse(model))
    assert reasons[model.two.first] == "sigmoid follows"
    assert reasons[model.two.last].startswith("Holder's forward decides by the values")


def test_a_mode_is_minded_and_effects_on_buffers_stay() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        if self.training:
            self.count.add_(1)
            return F.relu(self.norm(F.dropout(x, 0.5, self.training)))
        return F.relu(self.norm(x) + x)

    model = forward_of(forward)()
    fused = fuse(copy.deepcopy(model))
    for training in (True, False, True):
        model.train(training), fused.train(training)
        torch.manual_seed(0)
        expected = model(picture())
        torch.manual_seed(0)
        assert torch.equal(fused(picture()), expected)
    assert model.count == fused.count == 2


MODES = {
    "its own": lambda m: m.training,
    "the norm's": lambda m: m.norm.training,
    "a part's": lambda m: m.drop.training,
    "its own, then the norm's": lambda m: m.training and m.norm.training,
    "the norm's in one mode alone": lambda m: m.training or m.norm.training,
}


@pytest.mark.parametrize("fused_in", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("asked", MODES.values(), ids=MODES)
def test_whoever_is_asked_for_the_mode_norms_are_fused_in_both(
    asked: Callable[[nn.Module], bool], fused_in: bool
) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.relu(self.norm(x)) * (2 if asked(self) else 3)

    model = forward_of(forward)().train(fused_in)
    fused = fuse(copy.deepcopy(model))
    assert all(module.training is fused_in for module in fused.modules())
    for training in (True, False):
        model.train(training), fused.train(training)
        assert called_alone(fused, lambda m: m(picture())) == set()
        assert torch.equal(fused(picture()), model(picture()))
    model.train().norm.eval(), fused.train().norm.eval()
    assert torch.equal(fused(picture()), model(picture()))


def test_inputs_with_a_default_are_minded() -> None:
    def forward(
        self: nn.Module, x: Tensor, residual: Tensor | None = None, scale: float = 1.0
    ) -> Tensor:
        y = self.norm(x) * scale if scale != 1 else self.norm(x)
        return F.relu(y if residual is None else y + residual)

    model = forward_of(forward)()
    fused, x = fuse(copy.deepcopy(model)), picture()
    for arguments in ((x,), (x, 2 * x), (x, None, 3.0), (x, x, 0.5)):
        assert torch.equal(fused(*arguments), model(*arguments))
    assert torch.equal(fused(x=x, residual=x), model(x, x))
    assert str(inspect.signature(type(fused).forward)) == str(
        inspect.signature(type(model).forward)
    )


def set_flag(model: nn.Module) -> None:
    model.flag = True


CHANGES = {
    "an attribute": set_flag,
    "an attribute of a part": lambda m: setattr(m.inner, "flag", True),
    "the norm": lambda m: setattr(m.inner, "norm", nn.BatchNorm2d(C)),
    "the activation": lambda m: setattr(m, "act", nn.GELU()),
    "a longer sequence": lambda m: m.tail.append(nn.Sigmoid()),
    "its own forward": lambda m: setattr(m.inner, "forward", lambda x: 3 * x),
    "groups": lambda m: setattr(m.tail, "1", FusedGroupNorm(C, 4)),
}


class HeadOfLevels(nn.Module):
    """A head whose forward hands each level to a method, by a function of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 1), FusedGroupNorm(C)

    def forward(self, levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(map(self.forward_single, levels))

    def forward_single(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class BlockOfTwoForwards(nn.Module):
    """A block that is called by another method from the second time on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(C, C, 1), FusedGroupNorm(C)
        self.again = nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)

    def rfp_forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        y = self.norm(self.conv(x)) + x
        if before is not None:
            y = y + self.again(before)
        return F.relu(y)


def run_head(head: nn.Module) -> list[Tensor]:
    return [*head((picture(), 2 * picture()))]


def run_block(block: nn.Module) -> list[Tensor]:
    x = picture()
    return [block(x), block.rfp_forward(x, 2 * x)]


@pytest.mark.parametrize(
    ("kind", "run", "form"),
    [(HeadOfLevels, run_head, "GN+ReLU"), (BlockOfTwoForwards, run_block, "GN+add+ReLU")],
)
def test_other_methods_that_are_forwards_are_rewritten_as_well(
    kind: type[nn.Module], run: Callable[[nn.Module], list[Tensor]], form: str
) -> None:
    torch.manual_seed(0)
    model = randomized(kind())
    fused = fuse(copy.deepcopy(model))
    assert forms_of(fused) == {"norm": form}
    for each in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert called_alone(each, run) == set()
        assert all(map(torch.equal, run(each), run(model)))
    fused.norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert called_alone(fused, run) == {"norm"}


def test_a_method_that_is_called_in_another_way_than_recorded_runs_as_it_was_written() -> None:
    torch.manual_seed(0)
    model = randomized(BlockOfTwoForwards())
    fused = fuse(copy.deepcopy(model))
    assert torch.equal(fused.rfp_forward(picture(), None), model.rfp_forward(picture(), None))


class Levels(nn.Module):
    """A pyramid that asserts how many levels it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(FusedGroupNorm(C) for _ in range(3))

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        assert len(inputs) == len(self.lateral), "levels"
        assert inputs[0].shape[-1] == 8 and inputs[0].shape[-2] == (8), "size"
        levels = [norm(x) for norm, x in zip(self.lateral, [inputs[i] for i in range(3)])]  # noqa: B905
        for i in range(2, 0, -1):
            size = levels[i - 1].shape[2:]
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=size)
        return tuple(levels)


def test_assertions_of_lengths_and_sizes_hold_as_before() -> None:
    torch.manual_seed(0)
    model = randomized(Levels())
    fused = fuse(copy.deepcopy(model))
    assert forms_of(fused) == {"lateral.0": "GN+add", "lateral.1": "GN+add", "lateral.2": "GN"}
    levels = [torch.randn(2, C, n, n) for n in (8, 4, 2)]
    assert all(map(torch.equal, fused(levels), model(levels)))
    assert called_alone(fused, lambda m: m(levels)) == {"lateral.2"}
    for wrong in (levels[:2], [*levels, levels[0]], levels[::-1]):
        for each in (model, fused):
            with pytest.raises(AssertionError):
                each(wrong)
    torch.testing.assert_close(torch.compile(fused, backend="eager")(levels), model(levels))
    program = torch.export.export(fused, (levels,))
    torch.testing.assert_close(program.module()(levels), model(levels))
    assert len([1]) == 1 and len.__module__ == "builtins"


class Nested(nn.Module):
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.flag = nn.Conv2d(C, C, 1), FusedGroupNorm(C), False

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(2 * x if self.flag else x))

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.flag = Nested.Inner(), nn.ReLU(), False
        self.tail = nn.Sequential(nn.Conv2d(C, C, 1), FusedGroupNorm(C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x) + self.tail(x)
        return -y if self.flag else self.act(y)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_changed_after_fuse_is_minded(change: Callable[[nn.Module], None]) -> None:
    torch.manual_seed(0)
    model = Nested()
    fused = fuse(copy.deepcopy(model))
    assert set(forms_of(fused).values()) == {"GN+GN+add+ReLU"}
    assert_same_bits(model, fused)
    torch.manual_seed(2)
    change(model)
    torch.manual_seed(2)
    change(fused)
    fused.load_state_dict(model.state_dict())
    assert_same_bits(model, fused)


@pytest.mark.parametrize("watched", ["inner", "inner.norm", "act", "tail", "tail.0", "tail.1"])
def test_a_hook_on_a_part_sees_what_it_saw(watched: str) -> None:
    torch.manual_seed(0)
    model = Nested()
    seen: list[Tensor] = []
    for each in (model, fuse(copy.deepcopy(model))):
        part = each.get_submodule(watched)
        part.register_forward_hook(lambda module, inputs, output: seen.append(output))
        each(picture())
    assert torch.equal(*seen)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
def test_copies_and_pickles_are_fused_and_name_the_own_class(twin_of: Callable) -> None:
    torch.manual_seed(0)
    model = fuse(Nested())
    twin = twin_of(model)
    assert type(twin).unfused_kind is Nested and forms_of(twin) == forms_of(model)
    assert_same_bits(model, twin)
    assert b"unfused_kind" not in pickle.dumps(model)
    assert type(revert(twin)) is Nested and type(model) is not Nested


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False])
def test_a_scripted_block_computes_the_same(training: bool) -> None:
    from torchvision.models.resnet import Bottleneck

    model = nn.Sequential(
        Bottleneck(C, 8, norm_layer=FusedGroupNorm),
        Bottleneck(C, 16, downsample=nn.Sequential(nn.Conv2d(C, 64, 1), FusedGroupNorm(64)),
                   norm_layer=FusedGroupNorm),
    ).train(training)  # fmt: skip
    fused = fuse(copy.deepcopy(model))
    assert set(forms_of(fused).values()) == {"GN+ReLU", "GN+add+ReLU", "GN+GN+add+ReLU"}
    torch.testing.assert_close(torch.jit.script(fused)(picture()), model(picture()))


def test_a_block_compiles_without_a_graph_break() -> None:
    torch.manual_seed(0)
    model = Nested()
    compiled = torch.compile(fuse(copy.deepcopy(model)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(picture()), model(picture()))


def test_classes_without_a_module_are_fused() -> None:
    kind = eval("type('Made', (Nested,), {})", {"Nested": Nested, "__builtins__": {"type": type}})
    assert not hasattr(kind, "__module__") or "__module__" not in vars(kind)
    model = kind()
    assert set(forms_of(fuse(model)).values()) == {"GN+GN+add+ReLU"}
    assert type(revert(model)) is kind


def test_modules_in_several_places_compute_the_same() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(C, C, 1), FusedGroupNorm(C))
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x)) + torch.sigmoid(self.b(x))

    torch.manual_seed(0)
    model = Shared()
    assert_same_bits(model, fuse(copy.deepcopy(model)))


def test_timms_norms_without_activation_take_in_what_follows() -> None:
    class Timm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(C, C, 1), FusedGroupNorm(C)
            self.bn.__class__ = FusedGroupNormAct
            self.bn.drop, self.bn.act = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(self.conv(x)) + x)

    model = Timm()
    fused = fuse(copy.deepcopy(model))
    assert forms_of(fused) == {"bn": "GN+add+ReLU"}
    assert_same_bits(model, fused)
    model.bn.act = fused.bn.act = nn.Sigmoid()
    assert_same_bits(model, fused)


@pytest.mark.parametrize("act", [True, False])
def test_mmcvs_conv_modules_are_fused(act: bool) -> None:
    conv = ConvModule(C, C, 3, padding=1, norm_cfg={"type": "BN"},
                      act_cfg={"type": "ReLU"} if act else None)  # fmt: skip
    model = inject(nn.Sequential(conv, nn.ReLU()))
    fused = fuse(copy.deepcopy(model))
    assert set(forms_of(fused).values()) == {"GN+ReLU"}
    assert_same_bits(model, fused)
    for training in (True, False):
        assert called_alone(fused.train(training), lambda m: m(picture())) == set()


class NamedNorms(nn.Module):
    """A bottleneck as mmdetection writes it: norms by name, the work in a function inside."""

    def __init__(self, with_cp: bool = False) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name, self.with_cp = "gn1", "gn2", with_cp
        self.conv1, self.conv2 = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 1)
        self.add_module("gn1", FusedGroupNorm(C))
        self.add_module("gn2", FusedGroupNorm(C))
        self.relu, self.downsample = nn.ReLU(inplace=True), None

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            identity = x
            out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
            if self.downsample is not None:
                identity = self.downsample(x)
            out += identity
            return out

        if self.with_cp and x.requires_grad:
            out = checkpoint(inner, x, use_reentrant=False)
        else:
            out = inner(x)
        return self.relu(out)


def test_norms_behind_properties_are_fused_until_the_block_is_checkpointed() -> None:
    torch.manual_seed(0)
    model = NamedNorms()
    fused = fuse(copy.deepcopy(model))
    assert forms_of(fused) == {"gn1": "GN+ReLU", "gn2": "GN+add+ReLU"}
    assert_same_bits(model, fused)
    fused.with_cp = model.with_cp = True
    assert_same_bits(model, fused)
    assert set(forms_of(fuse(NamedNorms(with_cp=True))).values()) == {"GN"}


def test_lists_that_a_module_changes_for_its_caller_are_changed() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(
                nn.Sequential(nn.Conv2d(C, C, 1), FusedGroupNorm(C)) for _ in range(2)
            )

        def forward(self, x: list[Tensor]) -> list[Tensor]:
            for i, branch in enumerate(self.branches):
                x[i] = branch(x[i])
            return [F.relu(x[0] + x[1])]

    torch.manual_seed(0)
    model = Branches()
    seen = []
    for each in (model, fuse(copy.deepcopy(model))):
        levels = [picture(), 2 * picture()]
        seen.append([*each(levels), *levels])
    assert all(map(torch.equal, *seen))


def test_checkpointed_blocks_are_fused_inside() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block(ENDS["+ and ReLU"][0])

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model = Model()
    fused = fuse(copy.deepcopy(model))
    assert forms_of(fused)["block.norm2"] == "GN+add+ReLU"
    assert_same_bits(model, fused)


def test_a_failure_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(C, C, 1), FusedGroupNorm(C), nn.ReLU(), Nested())
    classes = [type(module) for module in model.modules()]
    monkeypatch.setitem(fuse.__globals__, "plan", lambda model: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fuse(model)
    assert [type(module) for module in model.modules()] == classes
    assert model[1].activation is None


def test_the_log_counts_norms_by_form_and_says_why_others_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="gn_det")
    fuse(nn.Sequential(block(ENDS["two norms"][0]), block(ENDS["GELU"][0])))
    first, second = caplog.messages
    assert first == "Sequential: fused 4 of 6 norms: 2 GN+GN+add+ReLU, 2 GN+ReLU"
    assert second.startswith("Sequential: 2 norms not fused, ") and "1: GELU follows" in second
    assert audit(nn.Sequential(FusedGroupNorm(C))).num_norms == 1
