"""The custom operator around the kernels: opcheck, compilation, DDP, higher derivatives."""

from __future__ import annotations

import copy

import pytest
import torch
from support.processes import in_two_processes
from torch import Tensor, nn

from gn_det.layers import FusedGroupNorm
from gn_det.ops import group_norm
from gn_det.ops.form import FORMS
from gn_det.ops.reference import group_norm_reference
from gn_det.ops.triton_op import fused_group_norm, fused_group_norm_backward


def sample(form: str, device: torch.device, layout: torch.memory_format) -> tuple:
    """Arguments of the operator that require gradients."""
    relu, add, normalize_add = FORMS[form]
    shape, groups = (2, 8, 4, 5), 2

    def tensor(*size: int) -> Tensor:
        return torch.randn(*size, device=device)

    x = tensor(*shape).contiguous(memory_format=layout).requires_grad_()
    residual = tensor(*shape).requires_grad_() if add else None
    parameters = [tensor(8).requires_grad_() for _ in range(4)]
    return (
        x, groups, *parameters[:2], 1e-5, relu,
        residual, normalize_add, *(parameters[2:] if normalize_add else (None, None)),
    )  # fmt: skip


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_opcheck_passes(form: str, layout: torch.memory_format, device: torch.device) -> None:
    torch.library.opcheck(fused_group_norm, sample(form, device, layout))


def test_opcheck_passes_for_the_backward_operator(device: torch.device) -> None:
    x, groups, weight, bias, eps, relu, *_ = (
        a.detach() if isinstance(a, Tensor) else a
        for a in sample("GN+ReLU", device, torch.channels_last)
    )
    _, statistics = fused_group_norm(
        x, groups, weight, bias, eps, relu, None, False, None, None
    )  # fmt: skip
    torch.library.opcheck(
        fused_group_norm_backward,
        (torch.randn_like(x), x, None, statistics, groups, weight, bias, relu, None, None, None),
    )


def stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        FusedGroupNorm(8, 2, activation="relu"),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        FusedGroupNorm(8, 4),
    )


def test_a_stack_compiles_without_a_graph_break(device: torch.device) -> None:
    model = stack().to(device)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 7, device=device)
    expected, y = model(x), compiled(x)
    assert torch.allclose(y, expected, atol=1e-6)
    expected.square().sum().backward()
    y.square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


def test_a_compiled_stack_takes_image_sizes_as_they_come(device: torch.device) -> None:
    model = stack().to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for height, width in ((6, 7), (9, 5), (4, 12)):
        x = torch.randn(1, 3, height, width, device=device)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)


def test_an_exported_stack_holds_the_operator(device: torch.device) -> None:
    model, x = stack().to(device), torch.randn(1, 3, 6, 7, device=device)
    program = torch.export.export(model, (x,))
    assert "gn_det.group_norm" in program.graph_module.code
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)


@pytest.mark.parametrize("form", ["GN", "GN+ReLU", "GN+add+ReLU", "GN+GN+add+ReLU"])
def test_second_derivatives_are_right(form: str, device: torch.device) -> None:
    x, groups, weight, bias, _, relu, residual, normalized, *rest = sample(
        form, device, torch.contiguous_format
    )
    inputs = [t for t in (x, weight, bias, residual, *rest) if t is not None]
    direction = torch.randn_like(x)

    def second(function) -> tuple[Tensor, ...]:
        y = function(
            x, groups, weight, bias, activation="relu" if relu else None, residual=residual,
            normalize_residual=normalized, residual_weight=rest[0], residual_bias=rest[1],
        )  # fmt: skip
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in first) + (first[0] * direction).sum()
        return torch.autograd.grad(penalty, inputs)

    for ours, truth in zip(second(group_norm), second(group_norm_reference), strict=True):
        assert torch.allclose(ours, truth.float(), rtol=1e-3, atol=1e-3 * truth.abs().max().item())


def test_parameters_may_be_views_with_strides(device: torch.device) -> None:
    x = torch.randn(2, 8, 3, 4, device=device)
    parameters = torch.randn(8, 2, device=device)
    weight, bias = parameters.unbind(dim=1)
    y = group_norm(x, 2, weight, bias)
    assert torch.equal(y, group_norm(x, 2, weight.clone(), bias.clone()))
    assert torch.allclose(y, group_norm_reference(x, 2, weight, bias).float(), atol=1e-5)


def _train_one_step(rank: int, device: str, weights: dict[str, Tensor], images: Tensor) -> None:
    model, images = stack().to(device), images.to(device)
    model.load_state_dict(weights)
    parallel = nn.parallel.DistributedDataParallel(model)
    # The second process has an empty batch: its parameters have zero gradients, not none.
    own = images[:1] if rank == 0 else images[:0]
    parallel(own).square().sum().backward()
    alone = stack().to(device)
    alone.load_state_dict(weights)
    alone(images[:1]).square().sum().backward()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad / 2, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one_even_with_an_empty_batch(device: torch.device) -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 3, 6, 7)
    in_two_processes(_train_one_step, device.type, stack().state_dict(), images)
