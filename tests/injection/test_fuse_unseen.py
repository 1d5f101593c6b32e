"""Forwards that do what a record does not show stay as they are, and do it as before."""

from __future__ import annotations

import builtins
import copy
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models import resnet18

from gn_det import fuse, inject
from gn_det.injection import watch
from gn_det.injection.rewrite import Rewritten


class Reverse(torch.autograd.Function):
    """Of gradients, as for domain adaptation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Swish(torch.autograd.Function):
    """Which keeps little."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class SwishInTwoParts(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Swish.backward(ctx, grad)


swish = Swish.apply  # as people name it
swish_in_two_parts = SwishInTwoParts.apply
KEPT: list[Tensor] = []


class Meter:
    @cached_property
    def factor(self) -> int:
        return 3

    def __init__(self) -> None:
        self.count, self.seen = 0, []

    def tick(self) -> None:
        self.count += 1

    def update(self, y: Tensor) -> None:
        self.seen.append(y.detach())


def normed(block: Block, x: Tensor) -> Tensor:
    return F.relu(block.norm(block.conv(x)) + x)


def reverses(block: Block, x: Tensor) -> Tensor:
    return normed(block, Reverse.apply(x))


def by_another_name(block: Block, x: Tensor) -> Tensor:
    return swish(normed(block, x))


def by_another_name_in_two_parts(block: Block, x: Tensor) -> Tensor:
    return swish_in_two_parts(normed(block, x))


def counts(block: Block, x: Tensor) -> Tensor:
    block.meter.tick()
    return normed(block, x)


def keeps_in_an_object(block: Block, x: Tensor) -> Tensor:
    y = normed(block, x)
    block.meter.update(y)
    return y


def keeps_in_a_global(block: Block, x: Tensor) -> Tensor:
    y = normed(block, x)
    KEPT.append(y)
    return y


def keeps_in_a_dict(block: Block, x: Tensor) -> Tensor:
    y = normed(block, x)
    block.meter.__dict__["last"] = y
    return y


def marks_its_result(block: Block, x: Tensor) -> Tensor:
    y = normed(block, x)
    y.level = 3
    return y


def saves_on_the_cpu(block: Block, x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return normed(block, x)


def without_cudnn(block: Block, x: Tensor) -> Tensor:
    with torch.backends.cudnn.flags(enabled=False):
        return normed(block, x)


def asks_for_inference(block: Block, x: Tensor) -> Tensor:
    return normed(block, x) * (2 if torch.is_inference_mode_enabled() else 1)


def asks_whether_it_is_exported(block: Block, x: Tensor) -> Tensor:
    return normed(block, x) * (2 if torch.onnx.is_in_onnx_export() else 1)


def asks_whether_it_is_compiled(block: Block, x: Tensor) -> Tensor:
    return normed(block, x) * (2 if torch.compiler.is_compiling() else 1)


def takes_what_has_tensors(block: Block, x: Any) -> Tensor:
    return normed(block, x.tensors if hasattr(x, "tensors") else x)


def takes_what_may_have_tensors(block: Block, x: Any) -> Tensor:
    return normed(block, getattr(x, "tensors", x))


def tries_what_an_input_has(block: Block, x: Any) -> Tensor:
    try:
        x = x.decompose()
    except AttributeError:
        x = x * 1
    return normed(block, x)


def tries_with_any_handler(block: Block, x: Any) -> Tensor:
    try:
        scale = x.scale_factor
    except Exception:
        scale = 1
    return normed(block, x) * scale


def takes_tensors_or_lists(block: Block, x: Any) -> Tensor:
    if type(x) in (list, tuple):
        x = sum(x)
    return normed(block, x)


@torch.compiler.disable
def not_compiled(block: Block, x: Tensor) -> Tensor:
    return normed(block, x)


class Block(nn.Module):
    """Runs one of the functions above as its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.meter = Meter()


def block_of(forward: Callable) -> Block:
    kind = type("Block", (Block,), {"forward": forward})
    return inject(kind(), num_groups=2)


def outcome(block: nn.Module, x: Tensor) -> tuple:
    """What a block gives and does in two calls."""
    KEPT.clear()
    results, gradients = [], []
    for _ in range(2):
        given = x.clone().requires_grad_()
        results.append(block(given))
        gradients += torch.autograd.grad(results[-1].sum(), given)
    kept = [y.detach() for y in (*KEPT, *block.meter.seen)]
    return results, gradients, kept, block.meter.count, vars(results[-1])


class Output(OrderedDict):
    """As transformers' ModelOutput: nothing can be taken out."""

    def __delitem__(self, key: str) -> None:
        raise RuntimeError(f"{key} stays")

    def items(self) -> Any:
        raise RuntimeError("nobody reads them all")


class Outputs(list):
    def clear(self) -> None:
        raise RuntimeError("they stay")


class Recent(deque):
    def extend(self, values: Any) -> None:
        raise RuntimeError("one at a time")


@pytest.mark.filterwarnings("ignore:fuse. none of the")
@pytest.mark.parametrize("holder", [Output, Outputs, Recent])
def test_stand_ins_are_taken_out_of_containers_that_refuse(
    holder: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = holder()
    monkeypatch.setitem(globals(), "KEPT", kept)

    def keeps(block: Block, x: Tensor) -> Tensor:
        y = normed(block, x)
        if isinstance(KEPT, dict):
            KEPT["y"] = y
        else:
            KEPT.append(y)
        return y

    assert not isinstance(fuse(block_of(keeps)), Rewritten)
    assert len(kept) == 0


FORWARDS = [
    reverses,
    by_another_name,
    by_another_name_in_two_parts,
    counts,
    keeps_in_an_object,
    keeps_in_a_global,
    keeps_in_a_dict,
    marks_its_result,
    tries_with_any_handler,
    saves_on_the_cpu,
    without_cudnn,
    asks_for_inference,
    asks_whether_it_is_exported,
    asks_whether_it_is_compiled,
    takes_what_has_tensors,
    takes_what_may_have_tensors,
    tries_what_an_input_has,
    takes_tensors_or_lists,
    not_compiled,
]


@pytest.mark.filterwarnings("ignore:fuse. none of the")
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda function: function.__name__)
def test_a_forward_that_a_record_would_change_stays(
    forward: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "KEPT", [])  # of no module that conftest.py froze
    block = block_of(forward)
    fused = fuse(copy.deepcopy(block))
    assert not isinstance(fused, Rewritten)
    assert not KEPT and vars(fused.meter) == vars(Meter())
    x = torch.randn(1, 8, 4, 4)
    torch.testing.assert_close(outcome(fused, x), outcome(block, x))


def by_config(block: Block, x: Tensor) -> Tensor:
    return normed(block, x) * (2 if block.cfg.twice else 1)


def by_what_is_cached(block: Block, x: Tensor) -> Tensor:
    return normed(block, x) * block.meter.factor


def by_the_type_of_a_part(block: Block, x: Tensor) -> Tensor:
    for part in (block.conv, block.norm):
        if type(part) is nn.Identity:
            return x
    return normed(block, x)


def with_a_part_by_its_name(block: Block, x: Any) -> Tensor:
    return F.relu(block.norm(getattr(block, "conv")(x.tensors)))  # noqa: B009


@pytest.mark.parametrize(
    "forward",
    [normed, by_config, by_what_is_cached, by_the_type_of_a_part, with_a_part_by_its_name],
    ids=lambda function: function.__name__,
)
def test_a_forward_that_does_none_of_it_is_fused(forward: Callable) -> None:
    block = block_of(forward)
    block.cfg = OmegaConf.create({"twice": True})
    assert isinstance(fuse(block), Rewritten)
    assert Reverse.apply(torch.ones(1, requires_grad=True)).grad_fn is not None
    with torch.backends.cudnn.flags(enabled=False):
        assert not torch.backends.cudnn.enabled


def test_a_registry_of_classes_does_not_see_the_generated_one() -> None:
    known: dict[str, type] = {}

    class Registered(Block):
        def __init_subclass__(cls, **kwargs: Any) -> None:
            assert cls.__name__ not in known
            known[cls.__name__] = cls

    class Theirs(Registered):
        forward = normed

    fused = fuse(inject(Theirs(), num_groups=2))
    assert isinstance(fused, Rewritten) and isinstance(copy.deepcopy(fused), Theirs)
    assert known == {"Theirs": Theirs}


def test_recording_leaves_everything_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(watch._UNSEEN, "asks what PyTorch no longer has", (torch, "no_such"))
    reads: list[str] = []

    def read(module: nn.Module, name: str) -> Any:  # another library's
        reads.append(name)
        return object.__getattribute__(module, name)

    monkeypatch.setattr(nn.Module, "__getattribute__", read, raising=False)
    there = {why: vars(owner).get(name) for why, (owner, name) in watch._UNSEEN.items()}
    fused = fuse(inject(resnet18()))
    assert isinstance(fused.layer1[0], Rewritten)
    assert len is vars(builtins)["len"] and type(len).__name__ == "builtin_function_or_method"
    assert vars(nn.Module)["__getattribute__"] is read and reads
    assert {why: vars(owner).get(name) for why, (owner, name) in watch._UNSEEN.items()} == there
    fused.note = 1


def test_what_a_record_does_not_show_is_called_so_in_this_pytorch() -> None:
    assert not [name for owner, name in watch._UNSEEN.values() if not hasattr(owner, name)]


def test_other_threads_call_functions_meanwhile() -> None:
    model, stop, wrong = nn.Sequential(*[block_of(normed) for _ in range(8)]), [], []

    def call() -> None:
        while not stop:
            try:
                Swish.apply(torch.ones(1, requires_grad=True)).backward()
            except BaseException as error:
                wrong.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    fuse(model)
    stop.append(True)
    thread.join()
    assert not wrong


def test_threads_can_copy_fused_models_at_once() -> None:
    model = nn.Sequential(*[block_of(normed) for _ in range(3)])
    fuse(model)
    wrong: list[object] = []

    def copy_them() -> None:
        try:
            for _ in range(5):
                wrong.extend(b for b in copy.deepcopy(model) if not isinstance(b, Rewritten))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=copy_them) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    nn.Linear(2, 2).tag = 1
    with torch.no_grad():
        model(torch.randn(1, 8, 4, 4))
