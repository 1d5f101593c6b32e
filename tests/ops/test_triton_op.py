"""The custom operator without its kernels: fake and meta tensors show shapes, memory and graphs."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.kernels import CHANNELS_LAST, CONTIGUOUS, make_inputs, run_operator
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from gn_det.layers import FusedGroupNorm
from gn_det.ops import group_norm
from gn_det.ops.form import FORMS, Form

META = torch.device("meta")
SHAPE, NUM_GROUPS = (2, 64, 50, 40), 32

every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def options_of(form: Form) -> dict[str, object]:
    return {
        "activation": "relu" if form.relu else None,
        "normalize_residual": form.normalize_add,
    }


def operators(graph: GraphModule) -> set[str]:
    """The operators that a graph calls, without their overloads."""
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return {str(target.overloadpacket) for target in calls if hasattr(target, "overloadpacket")}


def on_gpu(tensors: dict[str, Tensor], cuda: torch.device) -> dict[str, Tensor]:
    """The same sizes and strides there; without a GPU, PyTorch 2.6 can allocate, not slice."""
    return {
        name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=cuda)
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_form
def test_the_output_has_the_dtype_device_and_layout_of_the_input(
    form: Form, dtype: torch.dtype, cuda: torch.device
) -> None:
    for layout in (CONTIGUOUS, CHANNELS_LAST):
        inputs = make_inputs(form, SHAPE, META, dtype, layout)
        parameters = {name: tensor for name, tensor in inputs.items() if tensor.dim() == 1}
        images = {name: tensor for name, tensor in inputs.items() if tensor.dim() == 4}
        sliced = {name: image[:, :, ::2, 1:] for name, image in images.items()}
        turned = {name: image.transpose(2, 3) for name, image in images.items()}
        for tensors in (images, sliced, turned):
            tensors = on_gpu(tensors | parameters, cuda)
            x = tensors["x"]
            y = group_norm(**tensors, num_groups=NUM_GROUPS, **options_of(form))
            assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
            assert y.is_contiguous(memory_format=layout), f"{layout}: {y.stride()}"


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 64), CONTIGUOUS),
        ((2, 64, 9), CONTIGUOUS),
        ((2, 64, 3, 4, 5), CONTIGUOUS),
        ((2, 64, 3, 4, 5), torch.channels_last_3d),
        ((0, 64, 7, 7), CONTIGUOUS),
    ],
    ids=str,
)
def test_any_number_of_dimensions_and_samples_is_taken(
    shape: tuple, layout: torch.memory_format, cuda: torch.device
) -> None:
    x = torch.empty(shape, device=cuda, memory_format=layout)
    y = group_norm(x, NUM_GROUPS, activation="relu")
    assert y.shape == x.shape
    assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("normalize_residual", [True, False])
def test_under_autocast_a_float32_residual_does_not_widen_the_output(
    normalize_residual: bool, cuda: torch.device, autocast: None
) -> None:
    top = torch.empty(2, 64, 25, 20, device=cuda, dtype=torch.bfloat16)
    residual = F.interpolate(top, scale_factor=2.0, mode="nearest")
    assert residual.dtype == torch.float32
    lateral = torch.empty(SHAPE, device=cuda, dtype=torch.bfloat16)
    y = group_norm(lateral, NUM_GROUPS, residual=residual, normalize_residual=normalize_residual)
    assert y.dtype == torch.bfloat16


@every_form
def test_a_graph_on_the_gpu_holds_the_operator_and_nothing_else(
    form: Form, cuda: torch.device
) -> None:
    inputs = on_gpu(make_inputs(form, SHAPE, META), cuda)

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(inputs, tensors, strict=True))
        return group_norm(**named, num_groups=NUM_GROUPS, **options_of(form))

    assert operators(make_fx(function)(*inputs.values())) == {"gn_det.group_norm"}


def test_an_export_to_onnx_and_a_wish_for_aten_do_without_the_operator(
    cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.empty(SHAPE, device=cuda)

    def trace() -> set[str]:
        return operators(make_fx(lambda x: group_norm(x, NUM_GROUPS, activation="relu"))(x))

    assert trace() == {"gn_det.group_norm"}
    with monkeypatch.context() as patch:
        patch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert trace() == {"aten.native_group_norm", "aten.relu_"}
    monkeypatch.setenv("GN_DET_BACKEND", "aten")
    assert trace() == {"aten.native_group_norm", "aten.relu_"}


@pytest.mark.parametrize("strict", [True, False])
def test_an_export_on_the_gpu_holds_the_operator(strict: bool, cuda: torch.device) -> None:
    # Without gradients: for those PyTorch 2.6 asks a GPU for its stream.
    norm = FusedGroupNorm(64, activation="relu", device=cuda).requires_grad_(False)
    x = torch.empty(SHAPE, device=cuda)
    program = torch.export.export(norm, (x,), strict=strict)
    assert operators(program.graph_module) == {"gn_det.group_norm"}


def test_the_compiler_gets_the_operator_in_one_graph(cuda: torch.device) -> None:
    norm = FusedGroupNorm(64, activation="relu", device=cuda).requires_grad_(False)
    graphs = []

    def keep(graph: GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(norm, backend=keep, fullgraph=True)
    assert compiled(torch.empty(SHAPE, device=cuda)).shape == SHAPE
    assert [operators(graph) for graph in graphs] == [{"gn_det.group_norm"}]


def saved_for_backward(function: Callable[[], Tensor]) -> list[Tensor]:
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


def num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def leaves_for(form: Form, layout: torch.memory_format = CONTIGUOUS) -> dict[str, Tensor]:
    """bfloat16 images and float32 parameters of no values, all wanting a gradient."""
    inputs = make_inputs(form, SHAPE, META, torch.bfloat16, layout)
    return {name: tensor.requires_grad_() for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    ("name", "num_images", "num_statistics", "num_parameters"),
    [
        ("GN", 1, 2, 2),
        ("GN+ReLU", 1, 2, 2),
        ("GN+add+ReLU", 2, 2, 2),  # x and y: the mask, not the residual
        ("GN+GN+add+ReLU", 2, 4, 4),  # x and the residual
        ("GN+add", 1, 2, 2),
    ],
)
def test_backward_keeps_the_input_the_statistics_the_parameters_and_nothing_it_could_do_without(
    name: str, num_images: int, num_statistics: int, num_parameters: int
) -> None:
    inputs = leaves_for(FORMS[name])
    saved = saved_for_backward(lambda: run_operator(FORMS[name], NUM_GROUPS, inputs))
    images = [tensor for tensor in saved if tensor.shape == SHAPE]
    assert [image.dtype for image in images] == [torch.bfloat16] * num_images
    statistics = [tensor for tensor in saved if tensor.shape[1:] == (SHAPE[0], NUM_GROUPS)]
    assert [len(tensor) for tensor in statistics] == [num_statistics]
    parameters = [tensor for tensor in saved if tensor.shape == SHAPE[1:2]]
    assert len(parameters) == num_parameters
    assert len(saved) == num_images + 1 + num_parameters
    n, c, h, w = SHAPE
    assert num_bytes(saved) == (
        2 * num_images * n * c * h * w
        + 4 * num_statistics * n * NUM_GROUPS
        + 4 * num_parameters * c
    )


def test_aten_widens_to_float32_under_autocast(cuda: torch.device, autocast: None) -> None:
    x = torch.empty(SHAPE, device=cuda, dtype=torch.bfloat16)
    assert F.group_norm(x, NUM_GROUPS).dtype == torch.float32
    assert F.relu(F.group_norm(x, NUM_GROUPS)).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "fraction"),
    [
        ("GN", 1 / 2),
        ("GN+ReLU", 1 / 4),
        ("GN+add+ReLU", 1 / 2),
        ("GN+GN+add+ReLU", 1 / 3),
    ],
)
def test_backward_keeps_half_or_less_of_what_aten_keeps_under_autocast(
    name: str, fraction: float
) -> None:
    form, inputs = FORMS[name], leaves_for(FORMS[name])

    def aten() -> Tensor:
        # float() stands for autocast, which meta tensors do not have.
        y = F.group_norm(inputs["x"].float(), NUM_GROUPS, inputs["weight"], inputs["bias"])
        if form.normalize_add:
            parameters = inputs["residual_weight"], inputs["residual_bias"]
            y = y + F.group_norm(inputs["residual"].float(), NUM_GROUPS, *parameters)
        elif form.add:
            y = y + inputs["residual"]
        return F.relu(y) if form.relu else y

    ours = num_bytes(saved_for_backward(lambda: run_operator(form, NUM_GROUPS, inputs)))
    theirs = num_bytes(saved_for_backward(aten))
    # The images are exactly that fraction; statistics and parameters are less than 1% of them.
    assert fraction * theirs < 1.01 * ours < 1.02 * fraction * theirs


@pytest.mark.parametrize("layout", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@every_form
def test_gradients_have_the_dtype_and_layout_of_their_inputs(
    form: Form, layout: torch.memory_format
) -> None:
    leaves = leaves_for(form, layout)
    y = run_operator(form, NUM_GROUPS, leaves)
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.empty_like(y))
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert (gradient.shape, gradient.dtype) == (leaf.shape, leaf.dtype), name
        if leaf.dim() == 4:
            assert gradient.is_contiguous(memory_format=layout), f"{name}: {gradient.stride()}"


def stack() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        FusedGroupNorm(8, 4, activation="relu"),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        FusedGroupNorm(8, 4),
        nn.ReLU(),
    )


def test_on_the_cpu_a_compiled_stack_gives_the_same_output_and_gradients() -> None:
    model = stack()
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 6, 7)
    dy = torch.randn(2, 8, 6, 7)
    expected, y = model(x), compiled(x)
    torch.testing.assert_close(y, expected)
    expected.backward(dy)
    y.backward(dy)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_mixed_residual_under_autocast_compiles_into_one_graph() -> None:
    def merge(lateral: Tensor, top_down: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return group_norm(lateral, 4, residual=top_down)

    lateral, top_down = torch.randn(2, 8, 6, 7, dtype=torch.bfloat16), torch.randn(2, 8, 6, 7)
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    y = compiled(lateral, top_down)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, merge(lateral, top_down))


@pytest.mark.parametrize("strict", [True, False])
def test_on_the_cpu_an_exported_stack_holds_atens_operators_only(strict: bool) -> None:
    model, x = stack().eval(), torch.randn(2, 3, 6, 7)
    program = torch.export.export(model, (x,), strict=strict)
    names = operators(program.graph_module)
    assert "aten.group_norm" in names
    assert {name.split(".")[0] for name in names} == {"aten"}
    torch.testing.assert_close(program.module()(x), model(x))


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU go to the kernels, which are not there, if anything goes to them."""
    # The function hides its module of the same name from attribute access.
    module = importlib.import_module("gn_det.ops.group_norm")
    monkeypatch.setattr(module, "kernels_run_on", lambda device_type: True)


def test_float64_never_goes_to_the_kernels(cpu_as_gpu: None) -> None:
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    y = group_norm(x, 4, activation="relu")
    torch.testing.assert_close(y, F.relu(F.group_norm(x, 4)))


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_a_traced_stack_holds_atens_operators_only_wherever_it_was_traced(cpu_as_gpu: None) -> None:
    model, x = stack().eval(), torch.randn(2, 3, 6, 7)
    # The check of a trace runs the model itself, on the kernels.
    traced = torch.jit.trace(model, x, check_trace=False)
    graph = str(traced.inlined_graph)
    assert "aten::group_norm" in graph and "gn_det::" not in graph
    torch.testing.assert_close(traced(x), copy.deepcopy(model).double()(x.double()).float())
