"""What else PyTorch may be doing around a call: each mode gives the reference's numbers.

Each runs with ATen's operators as on any CPU, and through the custom operator of the kernels, which
ATen stands in for.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from support.kernels import LAYOUTS, find_truth, make_inputs
from support.processes import in_two_processes
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from gn_det.layers import FusedGroupNorm
from gn_det.ops import group_norm, guarded
from gn_det.ops.form import FORMS, Form
from gn_det.ops.reference import group_norm_reference

SHAPE, NUM_GROUPS = (2, 6, 5, 7), 3
CPU = torch.device("cpu")

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def take_operator() -> None:
    """Send tensors on the CPU through the operator of the kernels, which ATen stands in for."""
    module = importlib.import_module("gn_det.ops.group_norm")
    module.kernels_run_on = lambda device_type: True
    guarded.kernels_work = lambda device, dtype: False


@pytest.fixture(params=["ATen", "operator"], autouse=True)
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operator":
        module = importlib.import_module("gn_det.ops.group_norm")
        monkeypatch.setattr(module, "kernels_run_on", module.kernels_run_on)  # put back after
        monkeypatch.setattr(guarded, "kernels_work", guarded.kernels_work)
        take_operator()
    return request.param


def call(form: Form, tensors: dict[str, Tensor], function: Callable = group_norm) -> Tensor:
    return function(
        **tensors,
        num_groups=NUM_GROUPS,
        activation="relu" if form.relu else None,
        normalize_residual=form.normalize_add,
    )


def reference(form: Form, tensors: dict[str, Tensor]) -> Tensor:
    return call(form, tensors, group_norm_reference)


def doubled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in tensors.items()}


def assert_close(actual: Tensor, truth: Tensor, error: float = 1e-4) -> None:
    torch.testing.assert_close(actual.double(), truth, rtol=error, atol=error)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@every_form
def test_deterministic_algorithms_give_the_same_bits_twice(
    form: Form, layout: torch.memory_format
) -> None:
    inputs = make_inputs(form, SHAPE, CPU, layout=layout)
    dy = torch.randn(SHAPE)
    with deterministic():
        results = []
        for _ in range(2):
            leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
            y = call(form, leaves)
            results.append([y, *torch.autograd.grad(y, list(leaves.values()), dy)])
    assert all(map(torch.equal, *results))
    truth, gradients = find_truth(form, NUM_GROUPS, inputs, dy, y > 0)
    for actual, exact in zip(results[0], [truth, *gradients.values()], strict=True):
        assert_close(actual, exact)


@every_form
def test_vmap_over_any_one_argument(form: Form) -> None:
    inputs = make_inputs(form, SHAPE, CPU)
    for name in inputs:
        several = torch.stack([inputs[name], 2 * inputs[name] - 1, -inputs[name]])

        def one(tensor: Tensor, name: str = name) -> Tensor:
            return call(form, inputs | {name: tensor})

        expected = [reference(form, doubled(inputs | {name: tensor})) for tensor in several]
        assert_close(torch.vmap(one)(several), torch.stack(expected))


@every_form
def test_the_gradient_transform_and_gradients_by_sample(form: Form) -> None:
    inputs = make_inputs(form, SHAPE, CPU)

    def loss(function: Callable, tensors: dict[str, Tensor]) -> Tensor:
        return function(form, tensors).square().sum()

    found = torch.func.grad(functools.partial(loss, call))(inputs)
    truths = torch.func.grad(functools.partial(loss, reference))(doubled(inputs))
    for name, truth in truths.items():
        assert_close(found[name], truth, 1e-3)
    images = {name: t[:, None] for name, t in inputs.items() if t.dim() > 1}
    dims = ({name: 0 if name in images else None for name in inputs},)
    found = torch.vmap(torch.func.grad(functools.partial(loss, call)), dims)(inputs | images)
    assert found["weight"].shape == (SHAPE[0], SHAPE[1])
    assert_close(found["weight"].sum(0), truths["weight"], 1e-3)


def tangents_by_transform(
    form: Form, inputs: dict[str, Tensor], along: dict[str, Tensor]
) -> Tensor:
    return torch.func.jvp(lambda tensors: call(form, tensors), (inputs,), (along,))[1]


def tangents_in_forward_mode(
    form: Form, inputs: dict[str, Tensor], along: dict[str, Tensor]
) -> Tensor:
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(inputs[name], along[name]) for name in inputs}
        return forward_ad.unpack_dual(call(form, dual)).tangent


@pytest.mark.parametrize("tangents", [tangents_by_transform, tangents_in_forward_mode])
@every_form
def test_tangents(form: Form, tangents: Callable) -> None:
    inputs, along = make_inputs(form, SHAPE, CPU), make_inputs(form, SHAPE, CPU)
    _, truth = torch.func.jvp(
        lambda tensors: reference(form, tensors), (doubled(inputs),), (doubled(along),)
    )
    assert_close(tangents(form, inputs, along), truth, 1e-3)


def test_second_derivatives_by_transforms() -> None:
    x = torch.randn(1, 6, 2, 3)
    hessian = torch.func.hessian(lambda x: group_norm(x, NUM_GROUPS).pow(3).sum())
    truth = torch.func.hessian(lambda x: group_norm_reference(x, NUM_GROUPS).pow(3).sum())
    assert_close(hessian(x), truth(x.double()), 1e-2)


@every_form
def test_double_backward(form: Form) -> None:
    inputs, dy = make_inputs(form, SHAPE, CPU), torch.randn(SHAPE)

    def second(function: Callable, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = function(form, leaves)
        first = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype), create_graph=True)
        penalty = sum(gradient.square().sum() for gradient in first if gradient.requires_grad)
        return torch.autograd.grad(penalty, list(leaves.values()), materialize_grads=True)

    found, truths = second(call, inputs), second(reference, doubled(inputs))
    for actual, truth in zip(found, truths, strict=True):
        scale = truth.abs().max().clamp(min=1e-3)
        assert_close(actual / scale, truth / scale, 1e-3)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_batched_gradients() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    y = group_norm(x, NUM_GROUPS, activation="relu")
    several = torch.randn(3, *SHAPE)
    (found,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    expected = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in several]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("reentrant", [False, True])
@every_form
def test_checkpoints(form: Form, reentrant: bool) -> None:
    inputs, dy = make_inputs(form, SHAPE, CPU), torch.randn(SHAPE)

    def gradients(run: Callable) -> tuple[Tensor, ...]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        values = list(leaves.values())
        y = run(lambda *tensors: call(form, dict(zip(leaves, tensors, strict=True))), *values)
        return torch.autograd.grad(y, values, dy) if not reentrant else _grads(y, values, dy)

    plain = gradients(lambda function, *tensors: function(*tensors))
    found = gradients(lambda f, *tensors: checkpoint(f, *tensors, use_reentrant=reentrant))
    assert all(map(torch.equal, found, plain))


def _grads(y: Tensor, leaves: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    """A reentrant checkpoint takes backward() alone."""
    y.backward(dy)
    return tuple(leaf.grad for leaf in leaves)


@every_form
def test_the_compiler_traces_forward_and_backward(form: Form) -> None:
    torch.compiler.reset()
    inputs, dy = make_inputs(form, SHAPE, CPU), torch.randn(SHAPE)

    def gradients(function: Callable) -> list[Tensor]:
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = function(leaves)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), dy)]

    compiled = torch.compile(
        lambda tensors: call(form, tensors), backend="aot_eager", fullgraph=True
    )
    plain = gradients(lambda tensors: call(form, tensors))
    for actual, expected in zip(gradients(compiled), plain, strict=True):
        torch.testing.assert_close(actual, expected)


PICTURES = (3 * torch.arange(180.0)).cos().view(2, 3, 6, 5)
DY = (2 * torch.arange(480.0)).sin().view(2, 8, 6, 5)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        FusedGroupNorm(8, 4, activation="relu"),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        FusedGroupNorm(8, 4),
    )


@pytest.mark.parametrize("static_graph", [False, True])
def test_distributed_data_parallel(static_graph: bool, one_process: None) -> None:
    model = small_model()
    parallel = DistributedDataParallel(copy.deepcopy(model), static_graph=static_graph)
    for seed in range(2):
        x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(seed))
        for network in (model, parallel):
            network.zero_grad()
            network(x).backward(DY)
        for ours, theirs in zip(parallel.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def train_sharded(rank: int, folder: str, road: str) -> None:
    """A process of two: one step of the sharded model in mixed precision, its gradients saved."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if road == "operator":
        take_operator()
    mesh = init_device_mesh("cpu", (2,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = small_model()
    for layer in model:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    y = model(PICTURES)
    y.backward(DY.bfloat16())
    gradients = [parameter.grad.full_tensor() for parameter in model.parameters()]
    if rank == 0:
        torch.save((y.dtype, gradients), f"{folder}/gradients.pt")


@pytest.mark.slow
def test_fully_sharded_in_mixed_precision(tmp_path: Path, road: str) -> None:
    in_two_processes(train_sharded, str(tmp_path), road)
    dtype, gradients = torch.load(tmp_path / "gradients.pt")
    assert dtype == torch.bfloat16
    model = small_model()
    model(PICTURES).backward(DY)
    for found, parameter in zip(gradients, model.parameters(), strict=True):
        assert found.dtype == torch.float32
        scale = parameter.grad.abs().max()
        torch.testing.assert_close(found / scale, parameter.grad / scale, rtol=0.05, atol=0.05)
