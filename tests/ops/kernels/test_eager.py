"""The short road of eager tensors: the operator's results, and the operator where it is needed."""

from __future__ import annotations

import gc
import importlib
import weakref
from collections.abc import Callable

import pytest
import torch
from support.kernels import CHANNELS_LAST, CONTIGUOUS, LAYOUTS, make_inputs, run_operator
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gn_det.ops import eager, group_norm
from gn_det.ops.form import FORMS, Form
from gn_det.ops.kernels import launch
from gn_det.ops.triton_op import fused_group_norm

SHAPE, NUM_GROUPS = (3, 8, 4, 5), 4

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@pytest.fixture(autouse=True)
def no_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test meets its kinds of calls for the first time."""
    eager.kinds.clear()


@pytest.fixture
def operator_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each call of group_norm that the operator took."""
    # The function hides its module of the same name from attribute access.
    module = importlib.import_module("gn_det.ops.group_norm")
    calls = []

    def counted(*args: object) -> object:
        calls.append("operator")
        return fused_group_norm(*args)

    monkeypatch.setattr(module, "fused_group_norm", counted)
    return calls


def call(form: Form, inputs: dict[str, Tensor]) -> Tensor:
    return group_norm(
        **inputs,
        num_groups=NUM_GROUPS,
        activation="relu" if form.relu else None,
        normalize_residual=form.normalize_add,
    )


def sliced(tensor: Tensor) -> Tensor:
    """The same values with gaps between them."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def turned(tensor: Tensor) -> Tensor:
    """The same values with the last two dimensions in each other's place in memory."""
    if tensor.dim() < 4:
        return tensor
    return tensor.transpose(2, 3).contiguous().transpose(2, 3)


STRIDES = {"dense": lambda tensor: tensor, "sliced": sliced, "turned": turned}


@pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@every_form
def test_results_gradients_and_what_is_kept_equal_the_operators(
    form: Form,
    layout: torch.memory_format,
    strides: Callable[[Tensor], Tensor],
    device: torch.device,
    operator_calls: list[str],
) -> None:
    made = make_inputs(form, SHAPE, device, torch.float16, layout)
    dy = torch.randn(SHAPE, device=device).half().expand(SHAPE)

    def results(function: Callable) -> tuple[list[Tensor], list[Tensor]]:
        leaves = {name: strides(tensor).detach().requires_grad_() for name, tensor in made.items()}
        kept = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.detach())
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = function(form, leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), dy)], kept

    first, again, expected = (
        results(call),
        results(call),
        results(lambda form, inputs: run_operator(form, NUM_GROUPS, inputs)),
    )
    assert not operator_calls and len(eager.kinds) == 1
    for ours in (first, again):
        for found, truth in zip(ours, expected, strict=True):
            for a, b in zip(found, truth, strict=True):
                assert (a.dtype, a.stride()) == (b.dtype, b.stride())
                assert torch.equal(a, b)


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept(
    device: torch.device, operator_calls: list[str]
) -> None:
    form = FORMS["GN+GN+add+ReLU"]
    inputs = make_inputs(form, SHAPE, device)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    expected = call(form, leaves)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = call(form, leaves)
        assert torch.equal(y, expected) and y.grad_fn is None
    assert call(form, {n: t.detach() for n, t in leaves.items()}).grad_fn is None
    assert not operator_calls


class Marked(Tensor):
    """A tensor that somebody gave a class of their own."""


def in_fake_mode(x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        group_norm(torch.empty(SHAPE, device=x.device), NUM_GROUPS)


def with_forward_gradients(x: Tensor) -> None:
    with forward_ad.dual_level():
        group_norm(x, NUM_GROUPS)


def counting_flops(x: Tensor) -> None:
    with FlopCounterMode(display=False):
        group_norm(x, NUM_GROUPS)


OUTSIDERS = {
    "make_fx": lambda x: make_fx(lambda x: group_norm(x, NUM_GROUPS))(x),
    "fake tensors": in_fake_mode,
    "a mode": counting_flops,
    "a subclass": lambda x: group_norm(x.as_subclass(Marked), NUM_GROUPS),
}


@pytest.mark.parametrize("known", [False, True], ids=["first call", "known kind"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda x: torch.func.functionalize(lambda x: group_norm(x, NUM_GROUPS))(x),
        with_forward_gradients,
    ],
    ids=["functorch", "forward gradients"],
)
def test_transforms_have_the_rules_of_atens_operators(
    transform: Callable,
    known: bool,
    device: torch.device,
    operator_calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(SHAPE, device=device)
    if known:
        group_norm(x, NUM_GROUPS)
    monkeypatch.setattr(launch, "run", lambda *_: pytest.fail("a kernel was launched"))
    transform(x)
    assert not operator_calls


@pytest.mark.parametrize("known", [False, True], ids=["first call", "known kind"])
@pytest.mark.parametrize("look", OUTSIDERS.values(), ids=OUTSIDERS)
def test_whoever_looks_from_the_outside_sees_the_operator(
    look: Callable, known: bool, device: torch.device, operator_calls: list[str]
) -> None:
    x = torch.randn(SHAPE, device=device)
    if known:
        group_norm(x, NUM_GROUPS)
    assert not operator_calls
    look(x)
    assert operator_calls


def test_a_kind_that_was_checked_says_nothing_of_another(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(SHAPE, device=device), torch.ones(8, device=device)
    y = group_norm(x, NUM_GROUPS, weight, residual=x)
    for error, message, change in [
        (ValueError, "weight has shape", {"weight": torch.ones(4, device=device)}),
        (TypeError, "weight needs a floating-point", {"weight": weight.int()}),
        (ValueError, "weight is on meta", {"weight": weight.to("meta")}),
        (ValueError, "not a multiple of num_groups", {"num_groups": 3}),
        (ValueError, "activation is", {"activation": "gelu"}),
        (ValueError, "residual has shape", {"residual": x[:1]}),
        (TypeError, "residual is torch.float16", {"residual": x.half()}),
        (ValueError, "residual_weight and residual_bias need", {"residual_bias": weight}),
    ]:
        arguments = {"num_groups": NUM_GROUPS, "weight": weight, "residual": x} | change
        with pytest.raises(error, match=message):
            group_norm(x, **arguments)
    assert not torch.equal(group_norm(x, NUM_GROUPS, weight, eps=1.0, residual=x), y)
    ran = []
    monkeypatch.setattr(launch, "run", lambda *_: ran.append(1))
    monkeypatch.setenv("GN_DET_BACKEND", "aten")
    torch.testing.assert_close(group_norm(x, NUM_GROUPS, weight, residual=x), y)
    assert not ran


def test_the_kinds_that_are_remembered_are_bounded(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eager, "MAX_KINDS", 3)
    for height in range(1, 9):
        group_norm(torch.randn(1, 8, height, 2, device=device), NUM_GROUPS)
        assert 1 <= len(eager.kinds) <= 3


def test_a_kind_keeps_no_tensor_alive(device: torch.device) -> None:
    inputs = make_inputs(FORMS["GN+add+ReLU"], SHAPE, device)
    call(FORMS["GN+add+ReLU"], {n: t.requires_grad_() for n, t in inputs.items()}).sum().backward()
    dead = [weakref.ref(tensor) for tensor in inputs.values()]
    del inputs
    gc.collect()
    assert eager.kinds and not any(reference() is not None for reference in dead)


def test_a_changed_input_is_noticed_in_the_backward_pass(device: torch.device) -> None:
    x = torch.randn(SHAPE, device=device)
    weight = torch.ones(8, device=device, requires_grad=True)
    y = group_norm(x, NUM_GROUPS, weight)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_backward_pass_that_is_watched_calls_the_operator(device: torch.device) -> None:
    x = torch.randn(SHAPE, device=device, requires_grad=True)
    y = group_norm(x, NUM_GROUPS)

    names = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        watched = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    assert "gn_det.group_norm_backward.default" in names
    assert torch.equal(watched, torch.autograd.grad(y, x, torch.ones_like(y))[0])


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 8, 4, 5), (1, 1)),
        ((2, 8, 4, 5), (1, 1)),
        ((3, 8, 4, 5), (1, 2)),
        ((1, 8, 90, 64), (2, 2)),
        ((3, 8, 90, 64), (2, 2)),
        ((0, 8, 4, 5), (0, 0)),
    ],
    ids=str,
)
@every_form
def test_launches_of_a_call(
    form: Form,
    shape: tuple,
    expected: tuple[int, int],
    layout: torch.memory_format,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts = []
    monkeypatch.setattr(launch, "run", lambda launches, device: counts.append(len(launches)))
    leaves = {
        n: t.requires_grad_() for n, t in make_inputs(form, shape, device, layout=layout).items()
    }
    y = call(form, leaves)
    torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    assert tuple(counts) == expected


def test_a_layer_in_a_checkpoint_gives_the_same_gradients(device: torch.device) -> None:
    from gn_det.layers import FusedGroupNorm

    x = torch.randn(SHAPE, device=device, requires_grad=True)
    layer = nn.Sequential(FusedGroupNorm(8, 4, activation="relu"), FusedGroupNorm(8, 2)).to(device)
    expected = torch.autograd.grad(layer(x).square().sum(), x)[0]
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).square().sum()
    assert torch.equal(torch.autograd.grad(again, x)[0], expected)
