"""Fused models, whose classes are generated, where PyTorch takes modules apart."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from support.following import called_alone
from support.models import randomized
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gn_det import FusedGroupNorm, InputError, fuse, inject, unfuse

C = 32


class Block(nn.Module):
    """A residual block of nobody's, with a part of mmcv's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = ConvModule(C, C, 3, padding=1, norm_cfg={"type": "BN"})
        self.conv, self.norm = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(self.inner(x))) + x)


def models() -> tuple[nn.Module, nn.Module]:
    """One with GN, and the same one fused."""
    torch.manual_seed(0)
    model = randomized(inject(nn.Sequential(Block(), Block())))
    fused = fuse(copy.deepcopy(model))
    assert called_alone(fused, lambda m: m(picture())) == set()
    return model, fused


def picture() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, C, 6, 7)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model(x).square().mean().backward()
    return [each.full_tensor() if hasattr(each := p.grad, "full_tensor") else each
            for p in model.parameters()]  # fmt: skip


def assert_same_step(expected: nn.Module, actual: nn.Module) -> None:
    assert torch.equal(actual(picture()), expected(picture()))
    pairs = zip(gradients(actual, picture()), gradients(expected, picture()), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_data_parallel(static_graph: bool, one_process: None) -> None:
    model, fused = models()
    parallel = DistributedDataParallel(fused, static_graph=static_graph)
    assert_same_step(model, parallel)
    assert called_alone(fused, lambda m: m(picture())) == set()


# What is sharded by itself, and whether the norms below it are called as modules then: their
# parameters are gathered when a sharded module is called, so its parts are called as they were.
SHARDED = {
    "the model": (lambda m: [m], False),
    "each block": (lambda m: [*m, m], False),
    "parts of blocks": (lambda m: [m[0].inner, m[1].conv, m], False),
    "a norm": (lambda m: [m[0].norm, m], True),
}


@pytest.mark.parametrize(("sharded", "alone"), SHARDED.values(), ids=SHARDED)
def test_fully_sharded(sharded, alone: bool, one_process: None) -> None:
    model, fused = models()
    mesh = init_device_mesh("cpu", (1,))
    for part in sharded(fused):
        fully_shard(part, mesh=mesh)
    assert_same_step(model, fused)
    assert ("0.norm" in called_alone(fused, lambda m: m(picture()))) is alone


def test_a_sharded_block_is_not_unfused_but_named(one_process: None) -> None:
    _, fused = models()
    fully_shard(fused[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(InputError, match=r"0 is a FSDPBlock since fuse; undo that"):
        unfuse(fused)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exported(training: bool, strict: bool) -> None:
    model, fused = models()
    fused.train(training)
    program = torch.export.export(fused, (picture(),), strict=strict)
    assert torch.equal(program.module()(picture()), model(picture()))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_in_one_graph(dynamic: bool) -> None:
    model, fused = models()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(picture()), model(picture()))
    pairs = zip(gradients(compiled, picture()), gradients(model, picture()), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)


def test_a_copy_of_a_compiled_or_distributed_model_is_fused(one_process: None) -> None:
    _, fused = models()
    twin = copy.deepcopy(DistributedDataParallel(fused)).module
    assert any(isinstance(m, FusedGroupNorm) for m in twin.modules())
    assert called_alone(twin, lambda m: m(picture())) == set()
